"""The run's records: complete after a resume, readable while running."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_from_scratch.core import device as hardware
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine, RunLog, clock, plot_losses, read_metrics


def test_a_resumed_log_holds_every_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    log = RunLog(tmp_path, resumed_step=2)
    log.write(3, loss=9.0)
    log.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 9.0),
    ]


def test_a_picture_is_drawn_even_of_one_point(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(1, loss=2.0)
    log.write(1, val_loss=2.5)
    log.close()
    assert plot_losses(tmp_path, "one").read_bytes().startswith(b"\x89PNG")


def test_clock() -> None:
    assert [clock(s) for s in (0, 75, 3700)] == ["0:00", "1:15", "1:01:40"]


def test_live_line_repeats_itself_sparingly(capsys: pytest.CaptureFixture[str]) -> None:
    line = LiveLine(every_s=1e9)
    for step in range(5):
        line.show(f"step {step}")
    line.say("done")
    assert capsys.readouterr().err == "step 0\ndone\n"
    LiveLine(quiet=True).say("nothing")
    assert capsys.readouterr().err == ""


def test_measuring_does_not_draw_from_the_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert hardware.gemm_rate("cpu", torch.float32, 64) > 0
    assert torch.equal(torch.rand(1), expected)


def test_rng_state_round_trip() -> None:
    cpu = torch.device("cpu")
    state = hardware.rng_state(cpu)
    first = torch.rand(3)
    hardware.set_rng_state(state, cpu)
    assert torch.equal(first, torch.rand(3))


def test_unknown_devices_and_precisions_are_sentences() -> None:
    with pytest.raises(UserError, match="There is no device 'gpu'"):
        hardware.pick_device("gpu")
    with pytest.raises(UserError, match="auto, fp32 or bf16"):
        hardware.pick_precision("half", torch.device("cpu"))
    assert hardware.pick_device("cpu").type == "cpu"
