"""Which device a stage takes, what is said of it, and what becomes of its errors."""

from __future__ import annotations

import warnings

import pytest
import torch

from tailrace.pipeline.shared import compute as module
from tailrace.pipeline.shared.compute import Compute, gpus_seen
from tailrace.storage.errors import DeviceLostError, SettingsError


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert Compute().device_name == name
        assert Compute("cpu").device_name == "cpu"


def test_the_device_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with Compute("cpu", threads=1).opened():
            pass
    assert capsys.readouterr().err == f"device: cpu, threads: 1; GPUs: {gpus_seen()}\n"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Compute("cpu", quiet=True).opened():
        pass
    assert capsys.readouterr().err == ""


def test_a_driver_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old (found version 11040). Update it.", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert gpus_seen() == "none, The NVIDIA driver on your system is too old (found version 11040)"


def test_a_name_that_is_no_device_is_refused() -> None:
    with pytest.raises(SettingsError, match="--device gpu: is not a device; use auto, cpu, cuda or cuda:1"):
        Compute("gpu").opened().__enter__()


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpus_seen", lambda: "cuda:0, cuda:1")
    with pytest.raises(SettingsError, match=r"cuda:7: cannot be used here \(.+\). GPUs: cuda:0, cuda:1\. Take"):
        Compute("cuda:7").opened().__enter__()


def test_a_gpu_that_is_lost_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_open_device", torch.device)
    go_on = "the same command again continues from the last checkpoint"
    with pytest.raises(DeviceLostError, match=go_on), Compute("cuda:0", quiet=True).opened():
        raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronous")
    with pytest.raises(RuntimeError, match="device-side assert"), Compute("cuda:0", quiet=True).opened():
        raise RuntimeError("CUDA error: device-side assert triggered")
