"""Compiling and keeping the C++ kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import kernels.cpu.library as cpu
from kernels.cpu.library import SOURCE, VARIANTS, CpuKernelsUnavailable, build, load, native_variant, openmp_path


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile at once."""
    source = tmp_path / "source"
    source.mkdir()
    names = ("width", "linear", "paged_attention")
    code = "".join(f'extern "C" int pagemill_{name}() {{ return 4; }}\n' for name in names)
    (source / "all.cpp").write_text(code)
    monkeypatch.setattr(cpu, "SOURCE", source)
    if not any(shutil.which(compiler) for compiler in ("g++", "c++", "clang++")):
        pytest.skip("no compiler")
    return source


def test_openmp_is_found_wherever_torch_is_installed() -> None:
    maps = """\
7fb08a400000-7fb08a47a000 r--p 00000000 fe:00 2118321                    /usr/lib/libcompat.so.1
7fb0cbe70000-7fb0cbe76000 r-xp 00010000 fe:00 5243009                    /home/me/a folder/lib/libgomp.so.1.0.0
7fb0cbe80000-7fb0cbe86000 rw-p 00000000 00:00 0
"""
    assert openmp_path(maps) == "/home/me/a folder/lib/libgomp.so.1.0.0"
    assert openmp_path(maps.replace("libgomp", "libiomp5")) == "/home/me/a folder/lib/libiomp5.so.1.0.0"
    assert openmp_path(maps.replace("libgomp", "libgompertz/x")) is None


def test_build_compiles_again_only_when_sources_change(small_source: Path, tmp_path: Path) -> None:
    path = build("generic", tmp_path / "cache")
    assert load("generic", path).width == 4
    written = path.stat().st_mtime_ns
    assert build("generic", tmp_path / "cache") == path
    assert path.stat().st_mtime_ns == written
    (small_source / "all.cpp").write_text((small_source / "all.cpp").read_text() + "// more\n")
    assert build("generic", tmp_path / "cache") != path
    assert build("generic", tmp_path / "cache", options=("-DMORE",)) != path
    assert not list((tmp_path / "cache").glob(".compiling-*"))


def test_build_uses_only_existing_libraries_when_there_is_no_compiler(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build("generic", tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build("generic", tmp_path / "cache") == path
    with pytest.raises(CpuKernelsUnavailable, match="no C\\+\\+ compiler"):
        build("generic", tmp_path / "other")


def test_build_quotes_the_compiler_when_it_fails(small_source: Path, tmp_path: Path) -> None:
    (small_source / "all.cpp").write_text("#error this machine is too old\n")
    with pytest.raises(CpuKernelsUnavailable, match="this machine is too old"):
        build("generic", tmp_path / "cache")


def test_damaged_library_raises_our_error(tmp_path: Path) -> None:
    path = tmp_path / "damaged.so"
    path.write_bytes(b"\x7fELF and nothing more")
    with pytest.raises(CpuKernelsUnavailable, match="cannot be loaded"):
        load("generic", path)


def test_cache_directory_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_to_all, mine = tmp_path / "open", tmp_path / "mine"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(cpu, "_cache_candidates", lambda: iter((file, open_to_all, mine)))
    assert cpu._cache_directory() == mine
    assert mine.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(cpu, "_cache_candidates", lambda: iter((file, open_to_all)))
    with pytest.raises(CpuKernelsUnavailable, match="only ours"):
        cpu._cache_directory()


def test_prebuilt_library_is_preferred(small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PREBUILT", tmp_path / "built")
    path = build("generic", tmp_path / "built")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build("generic") == path


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "instruction"), [("avx512", "vpmaddwd"), ("avx512vnni", "vpdpwssd")])
def test_wide_variant_compiles(variant: str, instruction: str, tmp_path: Path) -> None:
    """Nothing more: it runs on machines with AVX-512 only."""
    if native_variant() == "generic":
        pytest.skip("no x86")
    try:
        path = build(variant, tmp_path)
    except CpuKernelsUnavailable as error:
        if "no C++ compiler" in str(error):
            pytest.skip(str(error))
        raise
    if shutil.which("objdump"):
        code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert "%zmm" in code
        assert instruction in code


def test_sources_are_installed() -> None:
    assert {path.name for path in SOURCE.iterdir()} >= {"linear.cpp", "paged_attention.cpp", "vectors.h", "product.h"}
    assert native_variant() in VARIANTS
    assert os.access(SOURCE, os.R_OK)
