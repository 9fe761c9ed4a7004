/* nvrtc_test LIBRARY HEADER ARCH EXPRESSION INCLUDE_DIR...
 * Compiles the device parts of HEADER with the NVRTC at LIBRARY, to machine code for ARCH, and demands that the kernel named by EXPRESSION is an
 * entry that cuModuleGetFunction can find: visible (or weak) in the PTX. A static kernel is neither. */
#include <dlfcn.h>
#include <nvrtc.h>

#include <cstdio>
#include <string>
#include <vector>

static void *library;

template <typename Function> static Function *find(const char *name) {
  void *address = dlsym(library, name);
  if (!address) std::printf("%s is not in the NVRTC library\n", name);
  return reinterpret_cast<Function *>(address);
}
#define NVRTC(name) find<decltype(name)>(#name)

static std::string text_of(nvrtcProgram program, decltype(&nvrtcGetPTXSize) size_of, decltype(&nvrtcGetPTX) get) {
  size_t bytes = 0;
  size_of(program, &bytes);
  std::string text(bytes, '\0');
  if (bytes) get(program, &text[0]);
  return text;
}

int main(int argc, char **argv) {
  if (argc < 6) return std::printf("usage: nvrtc_test LIBRARY HEADER ARCH EXPRESSION INCLUDE_DIR...\n"), 2;
  library = dlopen(argv[1], RTLD_NOW);
  if (!library) return std::printf("%s\n", dlerror()), 2;
  const std::string source = std::string("#include \"") + argv[2] + "\"\n", arch = std::string("--gpu-architecture=") + argv[3];
  const char *expression = argv[4];
  std::vector<std::string> includes;
  for (int i = 5; i < argc; ++i) includes.push_back(std::string("-I") + argv[i]);
  std::vector<const char *> options = {arch.c_str(), "-std=c++17"};
  for (const std::string &directory : includes) options.push_back(directory.c_str());

  nvrtcProgram program;
  if (NVRTC(nvrtcCreateProgram)(&program, source.c_str(), "test.cu", 0, nullptr, nullptr) != NVRTC_SUCCESS) return 2;
  if (NVRTC(nvrtcAddNameExpression)(program, expression) != NVRTC_SUCCESS) return 2;
  const nvrtcResult compiled = NVRTC(nvrtcCompileProgram)(program, (int)options.size(), options.data());
  const std::string log = text_of(program, NVRTC(nvrtcGetProgramLogSize), NVRTC(nvrtcGetProgramLog));
  if (log.size() > 1) std::printf("%s\n", log.c_str());
  if (compiled != NVRTC_SUCCESS || log.find("warning") != std::string::npos) return 1;

  const char *name = nullptr;
  if (NVRTC(nvrtcGetLoweredName)(program, expression, &name) != NVRTC_SUCCESS) return std::printf("no lowered name\n"), 1;
  const std::string entry = std::string(".entry ") + name + "(";
  const std::string ptx = text_of(program, NVRTC(nvrtcGetPTXSize), NVRTC(nvrtcGetPTX));
  const std::string code = text_of(program, NVRTC(nvrtcGetCUBINSize), NVRTC(nvrtcGetCUBIN));
  if (ptx.find(entry) == std::string::npos) return std::printf("%s is not an entry of the PTX\n", name), 1;
  if (ptx.find(".visible " + entry) == std::string::npos && ptx.find(".weak " + entry) == std::string::npos)
    return std::printf("%s is a static entry: no module lookup finds it\n", name), 1;
  if (code.find(std::string(".text.") + name) == std::string::npos) return std::printf("%s is not in the machine code\n", name), 1;
  return 0;
}
