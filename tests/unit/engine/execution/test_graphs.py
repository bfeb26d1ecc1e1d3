"""When graphs are captured, when not any more, and what is done instead, with a device that only pretends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from engine.device.cuda_graphs import CapturedRunner, batch_size, batch_sizes

MIB = 2**20


class PretendedDevice:
    """Each graph takes `tensors` bytes at its capture, and `driver` bytes at its first replay."""

    def __init__(self, *, tensors: int = 0, driver: int = 0) -> None:
        self.free = 1024 * MIB
        self.events: list[str] = []
        self.fails: list[Exception] = []
        self._tensors, self._driver = tensors, driver

    def free_bytes(self) -> int:
        self.events.append("measure")
        return self.free

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.events.append("capture")
        if self.fails:
            raise self.fails.pop(0)
        self.free -= self._tensors
        driver = [self._driver]

        def replay() -> None:
            self.events.append("replay")
            self.free -= driver.pop() if driver else 0

        return replay

    def work(self) -> None:
        self.events.append("work")


def out_of_memory_at_the_end_of_a_capture() -> RuntimeError:
    """As torch raises it: the end of the capture complains over what ended it."""
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = torch.OutOfMemoryError("out of memory")
    return error


def test_work_runs_once_then_is_captured_then_replayed() -> None:
    device = PretendedDevice()
    graphs = CapturedRunner(device, MIB)
    for _ in range(3):
        graphs.run("key", device.work)
    assert device.events == ["work", "measure", "capture", "replay", "measure", "replay"]


def test_prepared_work_is_replayed_from_its_first_run_on() -> None:
    device = PretendedDevice()
    graphs = CapturedRunner(device, MIB)
    assert graphs.prepare("key", device.work)
    assert device.events == ["work", "measure", "capture", "replay", "measure"]
    device.events.clear()
    graphs.run("key", device.work)
    assert device.events == ["replay"]


def test_graphs_count_what_tensors_and_driver_take_and_stop_at_the_limit() -> None:
    device = PretendedDevice(tensors=6 * MIB, driver=2 * MIB)
    graphs = CapturedRunner(device, 15 * MIB)
    assert graphs.prepare(1, device.work)
    assert graphs.num_bytes == 8 * MIB
    assert not graphs.prepare(2, device.work)
    assert graphs.num_bytes == 16 * MIB
    device.events.clear()
    for _ in range(3):
        graphs.run(3, device.work)
    assert device.events == ["work"] * 3


def test_capture_that_fails_is_tried_once_more(caplog: pytest.LogCaptureFixture) -> None:
    device = PretendedDevice()
    device.fails = [RuntimeError("another thread allocated")]
    graphs = CapturedRunner(device, MIB)
    graphs.run("key", device.work)
    graphs.run("key", device.work)
    assert device.events == ["work", "measure", "capture", "work"]
    assert "another thread allocated" in caplog.text
    graphs.run("key", device.work)
    assert device.events[4:] == ["measure", "capture", "replay", "measure"]


def test_capture_that_failed_twice_is_given_up() -> None:
    device = PretendedDevice()
    device.fails = [RuntimeError("cannot be captured"), RuntimeError("cannot be captured")]
    graphs = CapturedRunner(device, MIB)
    for _ in range(5):
        graphs.run("key", device.work)
    assert device.events.count("capture") == 2
    assert device.events.count("work") == 5


def test_no_graph_is_captured_after_memory_ran_out(caplog: pytest.LogCaptureFixture) -> None:
    device = PretendedDevice()
    device.fails = [out_of_memory_at_the_end_of_a_capture()]
    graphs = CapturedRunner(device, MIB)
    assert not graphs.prepare("large", device.work)
    assert "no memory" in caplog.text
    for _ in range(3):
        graphs.run("small", device.work)
    assert device.events.count("capture") == 1


@pytest.mark.parametrize("most", [1, 2, 3, 8, 9, 50, 256, 300, 1000, 4096])
def test_batch_sizes_are_those_of_all_batches_from_the_largest_down(most: int) -> None:
    expected = {batch_size(count) for count in range(1, most + 1)}
    assert list(batch_sizes(most)) == sorted(expected, reverse=True)
