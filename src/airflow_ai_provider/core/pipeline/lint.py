"""What can be run but is probably not meant: warnings about a spec that has no faults.

Invariant: pure; each warning says what will happen and the likely correction.
"""

from __future__ import annotations

from collections.abc import Iterator

from airflow_ai_provider.core.pipeline.spec import Spec

Warning_ = tuple[str, str]


def find_warnings(spec: Spec) -> list[Warning_]:
    """List what is unsafe or useless in a spec, as ``(path, text)``.

    :param spec: a spec without faults.
    """
    return [*_ingest(spec), *_decide(spec), *_review(spec), *_act(spec)]


def _ingest(spec: Spec) -> Iterator[Warning_]:
    ingest = spec.sections.ingest
    if ingest.expectations is None and ingest.format != "image":
        yield "ingest.expectations", "is not set: any row that can be decoded is accepted. Name a suite"
    if ingest.max_rejected is None:
        yield (
            "ingest.max_rejected",
            "is not set: a batch passes even when every row of it is rejected. Set it, e.g. 20%",
        )
    if ingest.key is None and spec.steps:
        yield "ingest.key", "is not set: two rows about the same thing are acted on twice. Name the column"


def _decide(spec: Spec) -> Iterator[Warning_]:
    policy, rule = spec.policy, spec.sections.decide.fallback
    if policy.act == policy.review:
        yield "decide.review", f"equals act ({policy.act:g}): no row goes to a person for its confidence"
    if policy.act == 0:
        yield "decide.act", "is 0: every prediction is acted on, however unsure"
    if policy.review == 0 and rule is not None:
        yield "decide.fallback", "is never used: review is 0, so no confidence lies below it"
    if rule is not None and "then" not in rule.model_fields_set:
        yield "decide.fallback", "has no then and else: it decides yes or no, which fits only a model that predicts so"
    if spec.steps:
        taken = {route for _, step in spec.steps for route in spec.rows_of(step)}
        if "act" not in taken:
            yield "act", "no step takes the rows of act: what the model is sure of has no effect"
        if rule is not None and "fallback" not in taken:
            yield "act", "no step takes the rows of fallback: what the rule decides has no effect"
        if spec.sections.review and "review" not in taken:
            yield "act", "no step takes the rows of review: what a person answers has no effect"


def _review(spec: Spec) -> Iterator[Warning_]:
    if spec.sections.review is None:
        yield "review", "is not set: ambiguous rows rest in the store and nobody is asked. Add review: {timeout: 4h}"


def _act(spec: Spec) -> Iterator[Warning_]:
    for at, (name, step) in enumerate(spec.steps):
        following = [other for other, _ in spec.steps[at + 1 :]]
        if step.undo is None and following:
            what = f"has no undo: when {' or '.join(following)} fails, what it did stays"
            yield f"act[{at}].{name}.undo", f"{what}. Add undo, or make it the last step"
        if isinstance(step.max_refused, str) and step.max_refused.strip() == "100%":
            yield f"act[{at}].{name}.max_refused", "is 100%: the task succeeds even when every call is refused"
