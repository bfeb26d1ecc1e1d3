"""Which GPUs `pagemill worker --gpus` means."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.gpus import NoSuchGpu, choose_gpus, group_gpus, visible_gpus
from cli.main import app


@pytest.mark.parametrize(
    ("visible", "wanted", "chosen"),
    [
        ("0,1,2", "all", ["0", "1", "2"]),
        ("0,1,2", "0,2", ["0", "2"]),
        ("4,5,7", "all", ["4", "5", "7"]),
        ("4,5,7", "2", ["7"]),  # a place among those that may be seen, as torch counts them
        ("GPU-8932f937,MIG-00d1", "1, 0", ["MIG-00d1", "GPU-8932f937"]),
    ],
)
def test_gpus_are_chosen_among_the_visible_ones(visible: str, wanted: str, chosen: list[str]) -> None:
    assert choose_gpus(wanted, {"CUDA_VISIBLE_DEVICES": visible}) == chosen


@pytest.mark.parametrize(
    ("visible", "wanted", "complaint"),
    [
        ("", "all", "No GPU is visible"),
        ("0,1", "2", "places from 0 to 1"),
        ("0,1", "-1", "places from 0 to 1"),
        ("0,1", "every", "places from 0 to 1"),
        ("0,1", "0,,1", "'' is none"),
        ("0,1", "1,01", "twice"),
    ],
)
def test_gpus_that_are_not_there_are_refused(visible: str, wanted: str, complaint: str) -> None:
    with pytest.raises(NoSuchGpu, match=complaint):
        choose_gpus(wanted, {"CUDA_VISIBLE_DEVICES": visible})


def test_gpus_are_those_of_nvidia_smi_where_none_were_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus({}) == ["0", "1"]
    tool.write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    assert visible_gpus({}) == []
    tool.unlink()
    assert visible_gpus({}) == []


def test_gpus_of_a_shared_model_go_to_one_worker() -> None:
    assert group_gpus(["0", "1", "2", "3"], 2) == [["0", "1"], ["2", "3"]]
    with pytest.raises(NoSuchGpu, match="cannot be divided"):
        group_gpus(["0", "1", "2"], 2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-m", "demo", "--gpus", "3"], "places from 0 to 1"),
        (["-m", "demo", "-m", "demo"], "the same name"),
        (["-m", "demo,smollm2", "--served-name", "one"], "2 models, but 1 times"),
        ([], "Name a model"),
    ],
)
def test_worker_says_what_is_wrong_with_its_options(
    arguments: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PAGEMILL_DATABASE_URL", "postgresql://u@127.0.0.1:1/none")
    done = CliRunner().invoke(app, ["worker", *arguments])
    assert done.exit_code == 2
    assert complaint in " ".join(done.stderr.split())
