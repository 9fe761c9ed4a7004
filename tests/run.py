#!/usr/bin/env python3
"""Every test that needs no GPU: formatting, host tests, compilation for every architecture, resource gates, linking, NVRTC, README, examples.

Needs gcc, clang, cmake, nvcc on PATH, and Python with pip. Builds in build/. The last line is `N passed, N failed`; the exit code says the same.
"""

import argparse
import concurrent.futures
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "tests", "compile"))
sys.dont_write_bytecode = True
import resources  # noqa: E402

BUILD = os.path.join(ROOT, "build")
WORK = os.path.join(BUILD, "tests")
PYPI = os.path.join(BUILD, "pypi")
CACHE = os.path.join(BUILD, "objects")
COMPILE = os.path.join("tests", "compile")

HEADERS = [h for h in ("flashcore.h", "flashcore_wmma.cuh", "flashcore_wgmma.cuh", "flashcore_fp8.cuh") if os.path.exists(os.path.join(ROOT, h))]
GATED = {"flashcore_wgmma.cuh": ["90a"], "flashcore_fp8.cuh": ["89", "90a"]}  # the others: 80, 89, 90; compiled as shipped, resources held to limits
ARCHES = ["75", "80", "86", "89", "90", "90a", "100", "120"]  # where not gated, compiled with less optimisation, for their errors and warnings
COST_ARCH = "89"
COST_HEADERS = [h for h in ("flashcore.h", "flashcore_wmma.cuh") if h in HEADERS]
COST_SECONDS = 60

C_WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Werror"]
IMPLEMENTATION = "-DFLASHCORE_IMPLEMENTATION"
NVCC = ["nvcc", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-I.", "-I" + COMPILE]
OLD_STUBS = ["-static-global-template-stub=false"]  # as before CUDA 13: a template kernel that is not static leaves a weak symbol
QUICK = ["-Xcicc", "-O1", "-Xptxas", "-O1"]  # less optimisation: machine code in half the time
PTX_ONLY = ["-gencode", "arch=compute_89,code=compute_89", "-Xcicc", "-O0"]  # for what is about symbols, not machine code
PTX_ONLY_90A = [flag.replace("_89", "_90a") for flag in PTX_ONLY]


# ---------------------------------------------------------------------------------------------------------------------------------
# Running checks
# ---------------------------------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """A check that does not hold; the text says why."""


class Log:
    def __init__(self):
        self.passed, self.failed, self.lock = 0, [], threading.Lock()

    def add(self, name, seconds, failure=None, note=""):
        with self.lock:
            if failure is None:
                self.passed += 1
                print(f"ok    {name}  ({seconds:.1f} s){'  ' + note if note else ''}", flush=True)
            else:
                self.failed.append(name)
                print(f"FAIL  {name}  ({seconds:.1f} s)\n" + "\n".join("      " + line for line in failure.splitlines()), flush=True)


LOG = Log()


def run_check(name, function):
    start = time.time()
    try:
        note = function() or ""
    except Failure as failure:
        LOG.add(name, time.time() - start, failure=str(failure))
    except Exception as error:  # a defect of the check itself is a failure too
        LOG.add(name, time.time() - start, failure=f"{type(error).__name__}: {error}")
    else:
        LOG.add(name, time.time() - start, note=note)


def run_all(checks, jobs):
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda check: run_check(*check), checks))


def sh(command, env=None, cwd=ROOT):
    """Run a command in the repository root; its output, or Failure."""
    result = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if result.returncode != 0:
        raise Failure(f"$ {' '.join(command)}\n{shorten(result.stdout)}\nexit code {result.returncode}")
    return result.stdout


def shorten(text, lines=60):
    kept = text.strip().splitlines()
    return "\n".join(kept if len(kept) <= lines else kept[: lines // 2] + [f"... {len(kept) - lines} lines ..."] + kept[-lines // 2 :])


def out(*parts):
    """A path under build/tests, relative to the root."""
    path = os.path.join(WORK, *parts)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return os.path.relpath(path, ROOT)


def files(*patterns):
    skip = (os.path.join(ROOT, "build") + os.sep, os.path.join(ROOT, ".git") + os.sep)
    found = {p for pattern in patterns for p in glob.glob(os.path.join(ROOT, "**", pattern), recursive=True)}
    return sorted(os.path.relpath(p, ROOT) for p in found if not p.startswith(skip))


_pypi_lock = threading.Lock()


def pypi(folder, *packages):
    """Packages from PyPI in build/pypi/<folder>, fetched once."""
    path = os.path.join(PYPI, folder)
    with _pypi_lock:
        if not os.path.exists(os.path.join(path, ".complete")):
            sh([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", path, *packages])
            open(os.path.join(path, ".complete"), "w").close()
    return path


# ---------------------------------------------------------------------------------------------------------------------------------
# Source text
# ---------------------------------------------------------------------------------------------------------------------------------


def check_format():
    tool = shutil.which("clang-format")
    if not tool or "version 14.0.6" not in sh([tool, "--version"]):
        tool = os.path.join(pypi("clang-format", "clang-format==14.0.6"), "bin", "clang-format")
    env = dict(os.environ, PYTHONPATH=os.path.join(PYPI, "clang-format"))
    sources = files("*.h", "*.c", "*.cpp", "*.cu", "*.cuh")
    sh([tool, "--dry-run", "-Werror", *sources], env=env)
    return f"{len(sources)} files"


def check_scripts():
    scripts = files("*.py")
    for path in scripts:
        with open(os.path.join(ROOT, path)) as f:
            compile(f.read(), path, "exec")
    for path in files("*.sh") + [".ci/run"]:
        sh(["bash", "-n", path])
    return f"{len(scripts)} Python files"


def source_checks():
    return [("sources_are_clang_formatted", check_format), ("scripts_parse", check_scripts)]


# ---------------------------------------------------------------------------------------------------------------------------------
# Host tests
# ---------------------------------------------------------------------------------------------------------------------------------

LANGUAGES = {
    "gcc_c11": ["gcc", "-std=c11"],
    "gcc_cxx17": ["g++", "-std=c++17", "-x", "c++"],
    "clang_c11": ["clang", "-std=c11"],
    "clang_cxx17": ["clang++", "-std=c++17", "-x", "c++"],
    "gcc_c11_sanitized": ["gcc", "-std=c11", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def host_test(source, compiler, label):
    program = out("host", os.path.splitext(os.path.basename(source))[0] + "." + label)
    sh([*compiler, "-O1", *([] if compiler[0] == "nvcc" else C_WARNINGS), "-I.", source, "-o", program, "-lm"])
    return (sh([program]).strip().splitlines() or [""])[-1]


def host_checks():
    c_tests, cuda_tests = files("tests/host/test_*.c"), files("tests/host/test_*.cu")
    if not c_tests:
        raise Failure("tests/host holds no test_*.c")
    checks = []
    for source in c_tests:
        name = os.path.splitext(os.path.basename(source))[0]
        checks += [(f"host_{name}_{label}", lambda s=source, c=c, n=label: host_test(s, c, n)) for label, c in LANGUAGES.items()]
    for source in cuda_tests:
        name = os.path.splitext(os.path.basename(source))[0]
        compiler = NVCC + (PTX_ONLY_90A if name in ("test_wgmma", "test_qgmma") else PTX_ONLY)
        checks.append((f"host_{name}_nvcc", lambda s=source, c=compiler: host_test(s, c, "nvcc")))
    return checks


# ---------------------------------------------------------------------------------------------------------------------------------
# Headers, compiled every way
# ---------------------------------------------------------------------------------------------------------------------------------

HEADER_MODES = {
    "declarations": [],
    "implementation": ["-DFLASHCORE_IMPLEMENTATION"],
    "static": ["-DFLASHCORE_STATIC"],
    "static_implementation": ["-DFLASHCORE_STATIC", "-DFLASHCORE_IMPLEMENTATION"],
    "prefix": ["-DFLASHCORE_PREFIX=acme_"],
    "prefix_implementation": ["-DFLASHCORE_PREFIX=acme_", "-DFLASHCORE_IMPLEMENTATION"],
}


def without_include_paths():
    return {k: v for k, v in os.environ.items() if k not in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH")}


def c_header(label, mode):
    command = [*LANGUAGES[label], *C_WARNINGS, *HEADER_MODES[mode], "-I.", "-c", f"{COMPILE}/header.c", "-o", out("header", f"{label}.{mode}.o")]
    sh(command, env=without_include_paths())


MISUSES = {  # source text, and what the compiler then says
    "late_implementation": (
        '#include "flashcore.h"\n#define FLASHCORE_IMPLEMENTATION\n#include "flashcore.h"\n',
        "define FLASHCORE_IMPLEMENTATION before flashcore.h",
    ),
    "static_backend_alone": (
        '#define FLASHCORE_STATIC\n#define FLASHCORE_BACKEND_IMPLEMENTATION\n#include "flashcore.h"\n',
        "with FLASHCORE_STATIC every file is on its own",
    ),
}


def misuse_is_refused(name):
    text, sentence = MISUSES[name]
    source = out("header", name + ".c")
    with open(os.path.join(ROOT, source), "w") as f:
        f.write(text)
    result = subprocess.run(["gcc", "-std=c11", "-fsyntax-only", "-I.", source], cwd=ROOT, capture_output=True, text=True)
    if result.returncode == 0 or sentence not in result.stderr:
        raise Failure(f"the compiler does not say: {sentence}\n{shorten(result.stderr)}")


def c_header_checks():
    labels = ["gcc_c11", "gcc_cxx17", "clang_c11", "clang_cxx17"]
    misuses = [(f"header_refuses_{name}", lambda n=name: misuse_is_refused(n)) for name in MISUSES]
    return misuses + [(f"header_{mode}_compiles_as_{label}", lambda a=label, b=mode: c_header(a, b)) for mode in HEADER_MODES for label in labels]


def arch_flags(*arches):
    return [flag for a in arches for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]


def gated_arches(header):
    return GATED.get(header, ["80", "89", "90"])


def other_arches(header):
    return [a for a in ARCHES if a not in gated_arches(header)]


def implementation_defines(header):
    """flashcore.h implements everything of its own; a backend header, its backends alone."""
    macro = IMPLEMENTATION if header == "flashcore.h" else "-DFLASHCORE_BACKEND_IMPLEMENTATION"
    return [macro, f'-DFLASHCORE_TEST_HEADER="{header}"']


def units(header):
    """The files that the README spreads a header over, by what they define: the two 16-bit types in two files build in parallel. Of fp8, each mode, and
    the quantisers, which come with the implementation of flashcore.h."""
    by_header = {
        "flashcore_wmma.cuh": [["-DFLASHCORE_NO_BF16"], ["-DFLASHCORE_NO_F16"]],
        "flashcore_fp8.cuh": [[], ["-DFLASHCORE_FP8_FAST"], [IMPLEMENTATION, "-DFLASHCORE_NO_E4M3", "-DFLASHCORE_NO_E5M2"]],
    }
    return by_header.get(header, [[]])


class Objects:
    """Optimised objects by (header, unit, arch): each compiled once, and kept in build/objects for as long as sources and command stay the same.
    With the ptxas log and the seconds of processor time."""

    def __init__(self):
        self.lock, self.locks, self.sources = threading.Lock(), {}, None

    def get(self, header, unit, arch):
        with self.lock:
            self.sources = self.sources or self.hash_of_sources()
            key_lock = self.locks.setdefault((header, unit, arch), threading.Lock())
        with key_lock:
            defines = [*implementation_defines(header), *units(header)[unit]]
            command = [*NVCC, *defines, "-Xptxas", "-v", *arch_flags(arch), "-c", f"{COMPILE}/implementation.cu"]
            key = hashlib.sha256(f"{self.sources} {command}".encode()).hexdigest()[:16]
            base = os.path.join(CACHE, f"{header}.{unit}.sm_{arch}.{key}")
            if not os.path.exists(base + ".json"):
                self.compile([*command, "-o", base + ".o"], base)
            with open(base + ".json") as f:
                return json.load(f)

    @staticmethod
    def hash_of_sources():
        digest = hashlib.sha256(sh(["nvcc", "--version"]).encode())
        for path in [*HEADERS, f"{COMPILE}/implementation.cu"]:
            with open(os.path.join(ROOT, path), "rb") as f:
                digest.update(f.read())
        return digest.hexdigest()

    @staticmethod
    def compile(command, base):
        os.makedirs(CACHE, exist_ok=True)
        for old in glob.glob(glob.escape(base.rsplit(".", 1)[0]) + ".*"):
            os.remove(old)
        with open(base + ".log", "w") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        with open(base + ".log", errors="replace") as log:
            text = log.read()
        if status:
            raise Failure(f"$ {' '.join(command)}\n{shorten(text)}")
        with open(base + ".json", "w") as f:
            json.dump({"object": base + ".o", "log": text, "seconds": usage.ru_utime + usage.ru_stime}, f)


OBJECTS = Objects()


def refuse_serialised(log):
    if found := sorted(set(re.findall(r"C75\d\d", log))):
        raise Failure("ptxas serialised wgmma or ignored setmaxnreg: " + ", ".join(found))


def compile_for(header, unit, arch):
    log = OBJECTS.get(header, unit, arch)["log"]
    refuse_serialised(log)
    kernels = resources.parse(log)
    if not kernels:
        raise Failure("the compiler's report names no kernel")
    return f"{len(kernels)} kernels"


def fat_binary(header, unit):
    defines = [*implementation_defines(header), *units(header)[unit]]
    obj = out("arch", f"{header}.{unit}.fat.o")
    sh([*NVCC, *QUICK, *defines, *arch_flags(*other_arches(header)), "-c", f"{COMPILE}/implementation.cu", "-o", obj])


def cuobjdump():
    """Of the toolkit, or else from PyPI with nvdisasm, which it runs."""
    if tool := shutil.which("cuobjdump"):
        return tool
    return os.path.join(pypi("cuobjdump-13", "nvidia-cuda-cuobjdump==13.*", "nvidia-cuda-nvdisasm==13.*"), "nvidia", "cu13", "bin", "cuobjdump")


HOPPER_INSTRUCTIONS = ("wgmma.mma_async", "cp.async.bulk.tensor", "mbarrier.try_wait", "setmaxnreg.inc", "setmaxnreg.dec")


def hopper_instructions(header):
    """A kernel without its body, as plain sm_90 would have it, compiles and links too."""
    ptx = out("arch", header + ".ptx")
    sh([*NVCC, *PTX_ONLY_90A, *implementation_defines(header), "-ptx", f"{COMPILE}/implementation.cu", "-o", ptx])
    with open(ptx) as f:
        kernels = [k for k in re.split(r"^(?:\.visible )?\.entry ", f.read(), flags=re.M)[1:] if re.search(r"gmma_(mixed_)?kernel", k.split("(")[0])]
    for kernel in kernels:
        if missing := [name for name in HOPPER_INSTRUCTIONS if name not in kernel]:
            raise Failure(f"{kernel[:120]}: without {', '.join(missing)}")
    if not kernels:
        raise Failure("no kernel found")
    return f"{len(kernels)} kernels"


def qmma_instructions(header):
    """On sm_89, fp8 kernels multiply by the fp8 tensor cores' own instruction: nothing is converted to fp16. Those with fp16 Q do just that. There, up to
    128 dims spill nothing; limits.json cannot tell sm_89 from sm_90a, which has to emulate the instruction."""
    result = OBJECTS.get(header, 0, "89")
    for kernel in resources.parse(result["log"]):
        if kernel["spill_bytes"] and re.match(r"qmma_kernel<.*, (64|128), ", kernel["name"]):
            raise Failure(f'{kernel["name"]} on sm_89: spill_bytes is {kernel["spill_bytes"]}')
    functions = re.split(r"^\s*Function : ", sh([cuobjdump(), "-sass", result["object"]]), flags=re.M)[1:]
    kernels = [f for f in functions if "qmma_kernel" in f.split("\n", 1)[0]]
    for kernel in kernels:
        fp8 = len(re.findall(r"\bQMMA\.16832\.F32\.E[45]M[23]\.E[45]M[23]\b", kernel))
        fp16, converted = len(re.findall(r"\bHMMA\.16816\.F32\b", kernel)), len(re.findall(r"\bF2FP\.F16\.E4M3\b", kernel))
        mixed = "qmma_mixed_tile_for" in kernel.split("\n", 1)[0]
        if (fp8 > 0 or fp16 < 64) if mixed else (fp8 < 32 or fp16 + converted > 0):
            raise Failure(f"{kernel[:120]}: {fp8} QMMA, {fp16} HMMA, {converted} conversions to fp16")
    if not kernels:
        raise Failure("no kernel found")
    return f"{len(kernels)} kernels"


def arch_checks():
    hopper = [h for h in ("flashcore_wgmma.cuh", "flashcore_fp8.cuh") if h in HEADERS]
    checks = [(f"{h}_kernels_are_made_of_hopper_instructions", lambda h=h: hopper_instructions(h)) for h in hopper]
    checks.append(("flashcore_fp8.cuh_kernels_for_sm_89_are_made_of_qmma", lambda: qmma_instructions("flashcore_fp8.cuh")))
    for header in reversed(HEADERS):  # the quick ones last
        for unit, defines in enumerate(units(header)):
            label = "".join("_with_" + d[2:].lower() for d in defines)
            for arch in gated_arches(header):
                checks.append((f"{header}{label}_compiles_for_sm_{arch}", lambda h=header, u=unit, a=arch: compile_for(h, u, a)))
            together = "_".join(other_arches(header))
            checks.append((f"{header}{label}_compiles_at_once_for_sm_{together}", lambda h=header, u=unit: fat_binary(h, u)))
    return checks


OPTIONS = ("FLASHCORE_NO_F32", "FLASHCORE_NO_F16", "FLASHCORE_NO_BF16", "FLASHCORE_NO_E4M3", "FLASHCORE_NO_E5M2")


def option_compiles(option):
    defines = [IMPLEMENTATION, '-DFLASHCORE_TEST_HEADER="all_headers.h"', f"-D{option}"]
    sh([*NVCC, *PTX_ONLY, *defines, "-c", f"{COMPILE}/implementation.cu", "-o", out("options", option + ".o")])


def option_checks():
    return [(f"{option}_compiles", lambda o=option: option_compiles(o)) for option in OPTIONS]


# ---------------------------------------------------------------------------------------------------------------------------------
# Resources and cost
# ---------------------------------------------------------------------------------------------------------------------------------


def gated_kernels(header):
    """Of a header's files; those of flashcore.h, which the quantisers' file holds too, are gated with flashcore.h."""
    results = [OBJECTS.get(header, u, a) for u in range(len(units(header))) for a in gated_arches(header)]
    kernels = [kernel for result in results for kernel in resources.parse(result["log"])]
    return [k for k in kernels if header == "flashcore.h" or not k["name"].startswith(("simt_", "merge_"))]


def gate(header):
    kernels = gated_kernels(header)
    if not kernels:
        raise Failure("the compiler's report names no kernel")
    if found := resources.violations(header, kernels):
        raise Failure("\n".join(found))
    return f'{len(kernels)} kernels, most registers {max(k["registers"] for k in kernels)}'


def unknown_headers():
    if unknown := sorted(set(resources.load()) - set(HEADERS)):
        raise Failure("limits.json names headers that are not there: " + ", ".join(unknown))


def resource_checks():
    checks = [(f"{header}_kernels_stay_within_declared_resources", lambda h=header: gate(h)) for header in HEADERS]
    return checks + [("limits_name_only_headers_that_exist", unknown_headers)]


def write_limits(jobs):
    """New limits from the objects that the tests use: what is compiled already is not compiled again."""
    wanted = [(h, u, a) for h in reversed(HEADERS) for u in range(len(units(h))) for a in gated_arches(h)]
    try:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda key: OBJECTS.get(*key), wanted))
        limits = {header: resources.measured_limits(header, gated_kernels(header)) for header in HEADERS}
    except Failure as failure:
        sys.exit(str(failure))
    resources.save(limits)
    print(f"wrote {os.path.relpath(resources.PATH, ROOT)}: read what changed before committing it")
    unexplained = [e["kernel"] for entries in limits.values() for e in entries if e.get("reason") == ""]
    for kernel in unexplained:
        print(f'spills without a "reason": {kernel}')
    return 1 if unexplained else 0


def device_code_bytes(obj):
    return sum(int(m) for m in re.findall(r"^\.nv_fatbin\s+(\d+)", sh(["size", "-A", obj]), re.MULTILINE))


def compile_cost():
    """Two cores build the default set for one arch, spread over files as README says. Processor time counts, so that a busy machine does not fail the
    gate: each file goes to the core that is free first."""
    start = time.time()
    wanted = [(h, u) for h in reversed(COST_HEADERS) for u in range(len(units(h)))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda w: OBJECTS.get(*w, COST_ARCH), wanted))
    wall, cores = time.time() - start, [0.0, 0.0]
    for (header, unit), result in zip(wanted, results):
        count, size = len(resources.parse(result["log"])), device_code_bytes(result["object"])
        if not count:
            raise Failure(f"{header}: the compiler's report names no kernel")
        cores[cores.index(min(cores))] += result["seconds"]
        figures = f"{result['seconds']:.1f} s, {count} kernels, {size / 1024 / count:.1f} KB and {result['seconds'] / count:.2f} s per kernel"
        print(" ".join(["     ", header, *units(header)[unit]]) + ": " + figures)
    figures = f"{max(cores):.1f} s on 2 cores, limit {COST_SECONDS} s (processor time {sum(cores):.1f} s, wall clock {wall:.1f} s)"
    if max(cores) > COST_SECONDS:
        raise Failure(figures)
    return figures


def cost_checks():
    return [(f"default_set_for_sm_{COST_ARCH}_compiles_in_time", compile_cost)]


# ---------------------------------------------------------------------------------------------------------------------------------
# Linking
# ---------------------------------------------------------------------------------------------------------------------------------


def cuda_object(source, name, *defines):
    obj = out("link", name + ".o")
    sh([*NVCC, *PTX_ONLY, *OLD_STUBS, *defines, "-c", f"{COMPILE}/{source}", "-o", obj])
    return obj


def c_object(source, name, *defines):
    obj = out("link", name + ".o")
    sh(["gcc", "-std=c11", *C_WARNINGS, "-I.", *defines, "-c", f"{COMPILE}/{source}", "-o", obj])
    return obj


def check_symbols(objects):
    """No weak symbol of ours, and none that two objects define."""
    owner, wrong = {}, []
    for obj in objects:
        for line in sh(["nm", "-P", obj]).splitlines():
            name, kind = line.split()[:2]
            if "flashcore" not in name:
                continue
            if kind in "WwVvu":
                wrong.append(f"{obj}: {name} is weak ({kind})")
            elif kind.isupper() and kind != "U":
                if name in owner:
                    wrong.append(f"{name} is in both {owner[name]} and {obj}")
                owner[name] = obj
    if wrong:
        raise Failure("\n".join(wrong))
    if not any("flashcore" in name for name in owner) and len(objects) > 1:
        return "no global symbol"
    return f"{len(owner)} global symbols"


def link_and_run(name, objects, *arguments, linker=("nvcc",)):
    program = out("link", name)
    sh([*linker, *objects, "-o", program, "-lm"])
    sh([program, *arguments])


def gpu_mode():
    return "gpu" if os.path.exists("/dev/nvidiactl") else "no-gpu"


def link_two_files():
    everything = ['-DFLASHCORE_TEST_HEADER="all_headers.h"', IMPLEMENTATION]
    objects = [cuda_object("implementation.cu", "everything", *everything), cuda_object("user.cu", "user")]
    objects.append(c_object("program.c", "program", "-DFLASHCORE_TEST_USER_FILE", "-DFLASHCORE_TEST_QUANTISERS"))
    note = check_symbols(objects)
    link_and_run("two_files", objects, gpu_mode())
    return note


def spread_objects():
    """Every file of every header; flashcore.h's own are among those of its quantisers' file, which comes first."""
    files = sorted(((h, u) for h in HEADERS[1:] for u in range(len(units(h)))), key=lambda file: IMPLEMENTATION not in units(file[0])[file[1]])
    return [cuda_object("implementation.cu", f"spread_{h}_{u}", *implementation_defines(h), *units(h)[u]) for h, u in files]


def link_spread_backends():
    """With a CUDA implementation, and with one compiled as C, which has nothing launched but links all the same."""
    implementation, *backends = spread_objects()
    objects = [implementation, *backends, c_object("program.c", "spread_program", "-DFLASHCORE_TEST_QUANTISERS")]
    note = check_symbols(objects)
    link_and_run("spread_backends", objects, gpu_mode())
    objects[0] = c_object("header.c", "spread_c_implementation", IMPLEMENTATION, "-DFLASHCORE_TEST_QUANTISERS")
    check_symbols(objects)
    link_and_run("spread_backends_of_c", objects, "no-cuda")
    return note


def link_copies(name, first, second):
    objects = [cuda_object("copy.cu", f"{name}_1", *first, "-DFLASHCORE_TEST_CHECK=first_copy_works")]
    objects.append(cuda_object("copy.cu", f"{name}_2", *second, "-DFLASHCORE_TEST_CHECK=second_copy_works"))
    objects.append(c_object("copies.c", f"{name}_main"))
    note = check_symbols(objects)
    link_and_run(name, objects)
    return note


def link_c_only():
    objects = [c_object("header.c", "c_implementation", IMPLEMENTATION), c_object("program.c", "c_program")]
    note = check_symbols(objects)
    link_and_run("c_only", objects, "no-cuda", linker=("gcc",))
    return note


def link_checks():
    prefixes = ["-DFLASHCORE_PREFIX=acme_"], ["-DFLASHCORE_PREFIX=zen_"]
    static = ["-DFLASHCORE_STATIC"], ["-DFLASHCORE_STATIC"]
    return [
        ("two_files_with_all_headers_link_without_weak_symbols", link_two_files),
        ("backends_spread_over_files_link", link_spread_backends),
        ("two_copies_with_prefixes_live_in_one_process", lambda: link_copies("prefixes", *prefixes)),
        ("two_static_copies_live_in_one_process", lambda: link_copies("static", *static)),
        ("c_program_without_cuda_uses_the_reference", link_c_only),
    ]


# ---------------------------------------------------------------------------------------------------------------------------------
# Device parts under NVRTC, and the oldest toolkit
# ---------------------------------------------------------------------------------------------------------------------------------


def toolkit():
    return os.path.dirname(os.path.dirname(os.path.realpath(shutil.which("nvcc") or "")))


def toolkit_include():
    for path in (os.path.join(toolkit(), "include"), os.path.join(toolkit(), "targets", "x86_64-linux", "include")):
        if os.path.exists(os.path.join(path, "cuda_fp16.h")):
            return path
    raise Failure("no CUDA headers next to nvcc")


OLD_CUDA = {  # package versions of one toolkit release
    "12.0": ["nvidia-cuda-nvrtc-cu12==12.0.140", "nvidia-cuda-runtime-cu12==12.0.146", "nvidia-cuda-cccl-cu12==12.0.140", "nvidia-cuda-nvcc-cu12==12.0.140"],
    "12.4": ["nvidia-cuda-nvrtc-cu12==12.4.127", "nvidia-cuda-runtime-cu12==12.4.127", "nvidia-cuda-cccl-cu12==12.4.127.post1", "nvidia-cuda-nvcc-cu12==12.4.131"],
}


def old_cuda(version):
    """The NVRTC library and the include directories of an older toolkit."""
    base = os.path.join(pypi("cuda-" + version, *OLD_CUDA[version]), "nvidia")
    library = glob.glob(os.path.join(base, "cuda_nvrtc", "lib", "libnvrtc.so.12"))[0]
    return library, [os.path.join(base, part, "include") for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]


def nvrtc_of(version):
    if version != "toolkit":
        return old_cuda(version)
    for directory in ("lib64", "lib", os.path.join("targets", "x86_64-linux", "lib")):
        if libraries := sorted(glob.glob(os.path.join(toolkit(), directory, "libnvrtc.so*"))):
            return libraries[0], [toolkit_include()]
    base = os.path.join(pypi("nvrtc-13", "nvidia-cuda-nvrtc==13.0.*"), "nvidia")
    return glob.glob(os.path.join(base, "**", "libnvrtc.so*"), recursive=True)[0], [toolkit_include()]


def nvrtc_kernels():
    """(header, name expression) pairs of nvrtc_kernels.txt."""
    with open(os.path.join(ROOT, COMPILE, "nvrtc_kernels.txt")) as f:
        rows = [line.split(None, 1) for line in f if line.strip() and not line.startswith("#")]
    return [(header, expression.strip()) for header, expression in rows]


_nvrtc_lock = threading.Lock()


def nvrtc_program():
    program = out("nvrtc", "nvrtc_test")
    with _nvrtc_lock:
        if not os.path.exists(os.path.join(ROOT, program + ".built")):
            sh(["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem", toolkit_include(), f"{COMPILE}/nvrtc_test.cpp", "-o", program, "-ldl"])
            open(os.path.join(ROOT, program + ".built"), "w").close()
    return program


def nvrtc_compiles(version, arch, header):
    library, includes = nvrtc_of(version)
    env = dict(os.environ, LD_LIBRARY_PATH=os.path.dirname(library) + ":" + os.environ.get("LD_LIBRARY_PATH", ""))
    expressions = [e for h, e in nvrtc_kernels() if h == header]
    if not expressions:
        raise Failure(f"nvrtc_kernels.txt names no kernel of {header}")
    for expression in expressions:
        sh([nvrtc_program(), library, header, "sm_" + arch, expression, ".", *includes], env=env)
    return f"{len(expressions)} kernels"


def nvrtc_arches(header):
    return gated_arches(header)


def nvrtc_checks():
    checks = []
    for version in ("toolkit", "12.4", "12.0"):
        for header in HEADERS:
            for arch in nvrtc_arches(header):
                name = f"{header}_device_parts_compile_with_nvrtc_{version}_for_sm_{arch}"
                checks.append((name, lambda v=version, a=arch, h=header: nvrtc_compiles(v, a, h)))
    return checks


def host_parts_with_oldest_headers(header):
    """nvcc 12.0 itself is in no Python package. Its device compiler is checked through NVRTC 12.0; here the host side of each file meets the 12.0
    headers: preprocessed as nvcc does it, then parsed by the CUDA front end of the toolkit at hand."""
    _, includes = old_cuda("12.0")
    version = ["-D__CUDACC_VER_MAJOR__=12", "-D__CUDACC_VER_MINOR__=0", "-D__CUDACC_VER_BUILD__=140"]
    defines = ["-D__CUDACC__", "-D__NVCC__", "-D__CUDA_ARCH_LIST__=800", *version, IMPLEMENTATION, *implementation_defines(header)]
    search = ["-I.", "-I" + COMPILE, *(flag for path in includes for flag in ("-isystem", path))]
    base = out("oldest", header)
    sh(["g++", "-std=c++17", "-E", "-x", "c++", *defines, *search, "-include", "cuda_runtime.h", f"{COMPILE}/implementation.cu", "-o", base + ".ii"])
    gcc = "".join(f"{int(n):02d}" for n in sh(["g++", "-dumpfullversion"]).strip().split(".")).lstrip("0")
    generated = ["--gen_c_file_name", base + ".cpp", "--stub_file_name", base + ".stub.c", "--gen_module_id_file", "--module_id_file_name", base + ".id"]
    options = ["--c++17", f"--gnu_version={gcc}", "--orig_src_file_name", "implementation.cu", "--allow_managed", "--m64", "--parse_templates"]
    sh([os.path.join(toolkit(), "bin", "cudafe++"), *options, *generated, base + ".ii"])


def oldest_checks():
    return [(f"{header}_host_parts_parse_with_cuda_12_0_headers", lambda h=header: host_parts_with_oldest_headers(h)) for header in HEADERS]


# ---------------------------------------------------------------------------------------------------------------------------------
# Building blocks, one by one
# ---------------------------------------------------------------------------------------------------------------------------------


# Parts of one kernel, which compiles them wherever it is compiled.
KERNEL_STEPS = ("simt_", "merge_", "wmma_", "mma_", "wgmma_", "quantise_", "qmma_", "qgmma_")


def device_functions():
    """{name: header} of the FLASHCORE_DEVICE building blocks: all but the steps of a kernel; with asm inside, all."""
    names = {}
    for header in HEADERS:
        with open(os.path.join(ROOT, header)) as f:
            text = re.sub(r"^#define.*$", "", f.read(), flags=re.MULTILINE)
        for m in re.finditer(r"\bFLASHCORE_DEVICE\s+[^;{()]*?(\w+)\s*\(", text):
            body = re.split(r"^}|;$", text[m.end() :], maxsplit=1, flags=re.MULTILINE)[0]
            if not m[1].startswith(KERNEL_STEPS) or "asm" in body:
                names.setdefault(m[1], header)
    return names


def every_block_is_taken():
    with open(os.path.join(ROOT, COMPILE, "wrappers.cu")) as f:
        text = f.read()
    names = device_functions()
    if not names:
        raise Failure("no FLASHCORE_DEVICE function found")
    if missing := [f"{name} ({header})" for name, header in names.items() if not re.search(rf"\b{name}\b", text)]:
        raise Failure("not in tests/compile/wrappers.cu: " + ", ".join(missing))
    return f"{len(names)} functions"


def wrappers_compile(arch):
    sh([*NVCC, *arch_flags(arch), "-c", f"{COMPILE}/wrappers.cu", "-o", out("wrappers", f"sm_{arch}.o")])


def wrapper_checks():
    compiled = [(f"every_building_block_compiles_alone_for_sm_{a}", lambda a=a: wrappers_compile(a)) for a in ("75", "89", "90a")]
    return [("every_building_block_has_its_address_taken", every_block_is_taken), *compiled]


# ---------------------------------------------------------------------------------------------------------------------------------
# GPU test programs, examples, README, receipts
# ---------------------------------------------------------------------------------------------------------------------------------


def gpu_program_compiles(source):
    """What asks the hardware about Hopper's instructions compiles to machine code; the others, to PTX."""
    target = [*arch_flags("90a"), "-Xptxas", "-v"] if source.endswith("test_hopper.cu") else PTX_ONLY
    refuse_serialised(sh([*NVCC, *target, "-Itests/gpu", "-c", source, "-o", out("gpu", os.path.basename(source) + ".o")]))


def gpu_program_checks():
    return [(f"gpu_{os.path.splitext(os.path.basename(s))[0]}_compiles", lambda s=s: gpu_program_compiles(s)) for s in files("tests/gpu/*.cu")]


def examples_build():
    if not os.path.exists(os.path.join(ROOT, "examples", "CMakeLists.txt")):
        raise Failure("examples/CMakeLists.txt is not there")
    sh(["cmake", "-S", "examples", "-B", "build/examples", f"-DCMAKE_CUDA_ARCHITECTURES={COST_ARCH}"])
    sh(["cmake", "--build", "build/examples", "-j2"])


def readme():
    path = os.path.join(ROOT, "README.md")
    if not os.path.exists(path):
        raise Failure("README.md is not there")
    with open(path) as f:
        return f.read()


def dedent(lines):
    """Trailing space, outer blank lines and the common indentation do not count."""
    lines = [line.rstrip() for line in lines]
    indent = min((len(line) - len(line.lstrip()) for line in lines if line), default=0)
    return "\n".join(line[indent:] for line in lines).strip("\n")


def example_regions():
    """Texts that README may show: {label: text} of whole example files and of their `// [readme:NAME]` to `// [readme:end]` regions."""
    regions = {}
    for path in files("examples/**/*.c", "examples/**/*.h", "examples/**/*.cpp", "examples/**/*.cu", "examples/**/*.cuh"):
        with open(os.path.join(ROOT, path)) as f:
            lines = f.read().splitlines()
        name, start = None, 0
        for number, line in enumerate(lines):
            if m := re.search(r"// \[readme:(\w+)\]", line):
                if name:
                    regions[f"{path} [readme:{name}]"] = dedent(lines[start:number])
                name, start = (None if m[1] == "end" else m[1]), number + 1
        if name:
            raise Failure(f"{path}: [readme:{name}] has no [readme:end]")
        regions[path] = dedent([line for line in lines if "// [readme:" not in line])
    return regions


def readme_snippets():
    regions, shown, wrong = example_regions(), set(), []
    blocks = re.findall(r"^```(?:c|cpp|c\+\+|cuda)\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    for block in blocks:
        label = next((where for where, text in regions.items() if text == dedent(block.splitlines())), None)
        if label is None:
            wrong.append("not an excerpt of a file under examples/:\n" + shorten(block, 8))
        shown.add(label)
    wrong += [f"{where} is not shown in README.md" for where in regions if "[readme:" in where and where not in shown]
    if wrong:
        raise Failure("\n".join(wrong))
    if not blocks:
        raise Failure("README.md shows no code")
    return f"{len(blocks)} blocks"


def readme_commands():
    """Shell blocks right after a `<!-- run -->` line, but for this test command itself."""
    blocks = re.findall(r"^<!-- run -->\s*\n```(?:sh|bash|shell|console)?\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    if not blocks:
        raise Failure("README.md marks no command with <!-- run -->")
    commands = [re.sub(r"^\$ ", "", line) for block in blocks for line in block.splitlines() if line.strip() and "tests/run" not in line]
    if commands:
        sh(["bash", "-e", "-c", "\n".join(commands)])
    return f"{len(commands)} lines"


def receipts():
    script = os.path.join("tests", "gpu", "receipt_check.py")
    if not os.path.exists(os.path.join(ROOT, script)):
        raise Failure(f"{script} is not there")
    text = sh([sys.executable, script]).strip()
    print("\n".join("      " + line for line in text.splitlines()), flush=True)


def example_checks():
    return [
        ("readme_code_is_verbatim_from_examples", readme_snippets),
        ("examples_build", examples_build),
        ("readme_commands_run", readme_commands),
        ("receipt_check_runs", receipts),
    ]


PARTS = {  # in order; the cost is measured while nothing else runs
    "source": source_checks,
    "cost": cost_checks,
    "host": host_checks,
    "headers": c_header_checks,
    "arches": arch_checks,
    "options": option_checks,
    "resources": resource_checks,
    "link": link_checks,
    "nvrtc": nvrtc_checks,
    "oldest": oldest_checks,
    "wrappers": wrapper_checks,
    "gpu": gpu_program_checks,
    "examples": example_checks,
}
ONE_AT_A_TIME = ("cost", "examples")


def run_part(part, jobs):
    print(f"--- {part}", flush=True)
    try:
        checks = PARTS[part]()
    except Failure as failure:
        LOG.add(part, 0, failure=str(failure))
        return
    run_all(checks, 1 if part in ONE_AT_A_TIME else jobs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these of: " + " ".join(PARTS))
    parser.add_argument("-j", "--jobs", type=int, default=max(2, os.cpu_count() or 2))
    parser.add_argument("--write-limits", action="store_true", help="regenerate tests/compile/limits.json from what the compiler reports now")
    options = parser.parse_args()
    if unknown := [p for p in options.parts if p not in PARTS]:
        parser.error("no such part: " + " ".join(unknown))
    shutil.rmtree(WORK, ignore_errors=True)
    if options.write_limits:
        return write_limits(options.jobs)
    start = time.time()
    for part in options.parts or PARTS:
        run_part(part, options.jobs)
    for name in LOG.failed:
        print(f"failed: {name}")
    print(f"{time.time() - start:.0f} s")
    print(f"{LOG.passed} passed, {len(LOG.failed)} failed")
    return 1 if LOG.failed or not LOG.passed else 0


if __name__ == "__main__":
    sys.exit(main())
