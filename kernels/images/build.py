#!/usr/bin/env python3
"""Compiles kernels/cuda to the images that the kernels crate embeds, or checks that those here are current.

    build.py           compile, write KERNEL.ARCH.{cubin,ptx}.z and manifest.json beside it (make images)
    build.py --hashes  compare sources with manifest.json, images with manifest.json; needs no compiler (CI)
    build.py --check   compile and compare with what is here, byte for byte (CI, where the compiler is)

The compiler is NVRTC from PyPI, pinned below; it needs neither a GPU nor a CUDA toolkit. Put it beside with
`pip install nvidia-cuda-nvrtc-cu12==12.9.86`. docs/adr/0003-gpu-images.md says why this one.
"""

import argparse
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import zlib

NVRTC = "12.9.86"
PACKAGE = "nvidia-cuda-nvrtc-cu12"
KERNELS = ["assemble", "resample"]
HEADERS = ["convert.cuh"]
ARCHS = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120"]
PTX = "compute_80"
# fmad=false: only what says fma is fused, as in the CPU twin, whose bits these must have.
OPTIONS = ["--std=c++17", "--fmad=false", "--restrict"]

HERE = pathlib.Path(__file__).resolve().parent
CUDA = HERE.parent / "cuda"
# What gpu_check measures beside; no product code, and not in the manifest.
NAIVE = HERE.parent / "examples" / "gpu_check" / "naive.cu"


def fail(message: str) -> None:
    sys.exit(f"build.py: {message}")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_source(name: str) -> bytes:
    return (CUDA / name).read_bytes()


def source_hash(kernel: str) -> str:
    """Of everything that decides an image: sources, options and compiler."""
    digest = hashlib.sha256()
    for name in [f"{kernel}.cu", *HEADERS]:
        data = read_source(name)
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    digest.update(json.dumps([PACKAGE, NVRTC, OPTIONS]).encode())
    return digest.hexdigest()


class Nvrtc:
    """The pinned library, through its C interface."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nvidia.cuda_nvrtc")
        if spec is None or not spec.submodule_search_locations:
            fail(f"{PACKAGE} is not installed; run: pip install {PACKAGE}=={NVRTC}")
        found = importlib.metadata.version(PACKAGE)
        if found != NVRTC:
            fail(f"{PACKAGE} is {found}, the images are pinned to {NVRTC}")
        lib = pathlib.Path(next(iter(spec.submodule_search_locations))) / "lib"
        # libnvrtc loads this one by name.
        ctypes.CDLL(str(next(lib.glob("libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(lib / "libnvrtc.so.12"))
        self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *args: object) -> None:
        code = getattr(self.lib, name)(*args)
        if code != 0:
            fail(f"{name}: {self.lib.nvrtcGetErrorString(code).decode()}")

    def compile(self, kernel: str, arch: str) -> bytes:
        return self.compile_file(CUDA / f"{kernel}.cu", arch)

    def compile_file(self, path: pathlib.Path, arch: str) -> bytes:
        program = ctypes.c_void_p()
        sources = (ctypes.c_char_p * len(HEADERS))(*[read_source(h) for h in HEADERS])
        names = (ctypes.c_char_p * len(HEADERS))(*[h.encode() for h in HEADERS])
        self.call(
            "nvrtcCreateProgram", ctypes.byref(program), path.read_bytes(), path.name.encode(),
            len(HEADERS), sources, names,
        )  # fmt: skip
        options = [f"--gpu-architecture={arch}", *OPTIONS]
        packed = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
        code = self.lib.nvrtcCompileProgram(program, len(options), packed)
        log = self.get(program, "ProgramLog").rstrip(b"\0").decode().strip()
        if code != 0 or log:
            print(log, file=sys.stderr)
        if code != 0:
            fail(f"{path.name} does not compile for {arch}")
        image = self.get(program, "CUBIN" if arch.startswith("sm_") else "PTX")
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return image

    def get(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw


def file_name(kernel: str, arch: str) -> str:
    return f"{kernel}.{arch}.cubin" if arch.startswith("sm_") else f"{kernel}.{arch}.ptx"


def build() -> dict[str, bytes]:
    nvrtc = Nvrtc()
    return {file_name(k, a): nvrtc.compile(k, a) for k in KERNELS for a in [*ARCHS, PTX]}


def manifest(images: dict[str, bytes]) -> str:
    """Hashes are of images before compression."""
    facts = {
        "compiler": f"{PACKAGE}=={NVRTC}",
        "options": OPTIONS,
        "sources": {kernel: source_hash(kernel) for kernel in KERNELS},
        "images": {
            name: {"bytes": len(data), "sha256": sha256(data)} for name, data in sorted(images.items())
        },
    }
    return json.dumps(facts, indent=2) + "\n"


def stored() -> dict[str, bytes]:
    images = {path.name.removesuffix(".z"): zlib.decompress(path.read_bytes()) for path in HERE.glob("*.z")}
    wanted = {file_name(kernel, arch) for kernel in KERNELS for arch in [*ARCHS, PTX]}
    if images.keys() != wanted:
        fail(
            f"missing {sorted(wanted - images.keys())}, unknown {sorted(images.keys() - wanted)}; "
            "run: make images"
        )
    return images


def check_hashes() -> None:
    known = json.loads((HERE / "manifest.json").read_text())
    for kernel in KERNELS:
        if known["sources"].get(kernel) != source_hash(kernel):
            fail(
                f"cuda/{kernel}.cu (or a header, an option, the compiler) changed after its images; "
                "run: make images"
            )
    if manifest(stored()) != (HERE / "manifest.json").read_text():
        fail("the images are not those of manifest.json; run: make images")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--hashes", action="store_true")
    mode.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.hashes:
        check_hashes()
        return
    images = build()
    if args.check:
        check_hashes()
        for name, data in stored().items():
            if images.get(name) != data:
                fail(f"{name} is not what {PACKAGE}=={NVRTC} makes of the sources; run: make images")
        return
    for path in HERE.glob("*.z"):
        path.unlink()
    NAIVE.with_suffix(".ptx").write_bytes(Nvrtc().compile_file(NAIVE, PTX).rstrip(b"\0"))
    for name, data in images.items():
        (HERE / f"{name}.z").write_bytes(zlib.compress(data, 9))
        print(f"{name}: {len(data):,} bytes")
    (HERE / "manifest.json").write_text(manifest(images))


if __name__ == "__main__":
    main()
