"""Golden files: each pipeline file with the plan it becomes, each faulty one with the text that its author reads.

To accept a change, run ``python -m tests.golden.test_plan`` and read the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from airflow_ai_provider.core.pipeline.plan import plan
from airflow_ai_provider.core.pipeline.render import render
from airflow_ai_provider.core.pipeline.spec import load_spec, parse_spec
from airflow_ai_provider.errors import SpecError

HERE = Path(__file__).parent
FAULTY = sorted(path.name for path in HERE.glob("*.faults.yaml"))
SOUND = sorted(path.name for path in HERE.glob("*.yaml") if path.name not in FAULTY)


def planned(name: str) -> dict[str, str]:
    """File name → text of everything that a sound file becomes."""
    made = plan(load_spec(HERE / name))
    stem = name.removesuffix(".yaml")
    data = json.dumps(made.to_dict(), indent=1, ensure_ascii=False, sort_keys=True)
    return {f"{stem}.plan.json": f"{data}\n", f"{stem}.plan.txt": f"{render(made)}\n"}


def complaint(name: str) -> dict[str, str]:
    """File name → the message of a faulty file."""
    with pytest.raises(SpecError) as caught:
        parse_spec((HERE / name).read_text(encoding="utf-8"), name.partition(".")[0])
    return {name.replace(".yaml", ".txt"): f"{caught.value}\n"}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_file_becomes_this_plan(name: str) -> None:
    for golden, text in planned(name).items():
        assert text == (HERE / golden).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_file_is_refused_with_these_words(name: str) -> None:
    for golden, text in complaint(name).items():
        assert text == (HERE / golden).read_text(encoding="utf-8")


def test_the_example_pipelines_are_among_them() -> None:
    examples = HERE.parents[1] / "dags" / "pipelines"
    for path in examples.glob("*.yaml"):
        golden = json.loads((HERE / f"{path.stem}.plan.json").read_text(encoding="utf-8"))
        assert plan(load_spec(path)).to_dict() == golden, f"{path.name} has changed: copy it here"


if __name__ == "__main__":
    for name in SOUND + FAULTY:
        for file, text in (planned if name in SOUND else complaint)(name).items():
            (HERE / file).write_text(text, encoding="utf-8")
