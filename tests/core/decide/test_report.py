"""The report's numbers, and that they reach the picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from airflow_ai_provider.core.decide.policy import Policy
from airflow_ai_provider.core.decide.report import draw_report, histogram

POLICY = Policy(0.93, 0.6)


def test_every_confidence_is_counted_once_in_its_zone() -> None:
    confidence = [0.0, 0.59, 0.6, 0.929999, 0.93, 1.0, float("nan")]
    table = histogram(confidence, POLICY)
    by_zone = {z: 0 for z in ("rest", "review", "act")}
    for row in table.to_pylist():
        assert not any(row["low"] < bar < row["high"] for bar in (0.93, 0.6))
        by_zone[row["zone"]] += row["row_count"]
    assert by_zone == {"rest": 2, "review": 2, "act": 2}
    assert sum(histogram([], POLICY)["row_count"].to_pylist()) == 0


def test_the_picture_shows_the_zones_and_is_the_same_again(tmp_path: Path) -> None:
    confidence = np.random.default_rng(0).random(5000)
    right = confidence > 0.4
    draw_report(confidence, POLICY, tmp_path / "a.png", right)
    draw_report(confidence, POLICY, tmp_path / "b.png", right)
    draw_report(confidence, POLICY, tmp_path / "one.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as both, Image.open(tmp_path / "one.png") as one:
        assert both.width > 1.8 * one.width
        colours = {colour for _, colour in both.convert("RGB").getcolors(1 << 20)}
        assert {(0x2E, 0x7D, 0x4F), (0xD9, 0x8E, 0x04), (0x1F, 0x4E, 0x9C)} <= colours


def test_numbers_need_no_matplotlib() -> None:
    code = "import sys, airflow_ai_provider.core.decide.report as r; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
