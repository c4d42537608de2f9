"""What the story came to: the counts, checked against the truth and against each other; the pictures; where to look.

Invariants: nothing is counted from memory: batches are read from the store, effects from the ledger, tickets and pages
from the service that received them; any two that disagree are a fault, and a fault is never hidden.
"""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from airflow_ai_provider.core.batch import ROUTES, ROW_ID, BatchRef
from airflow_ai_provider.core.decide.policy import Policy
from airflow_ai_provider.core.decide.report import draw_report
from airflow_ai_provider.core.ledger import Entry
from airflow_ai_provider.core.ledger_sql import open_ledger
from airflow_ai_provider.core.store import Store
from demo.story import DAG_ID, Told
from demo.world import World

STATES = ("done", "refused", "unknown", "compensated")
Rows = list[dict[str, Any]]


class Report:
    """Read everything once, compare, and tell.

    :param world: the servers.
    :param told: what the story left behind.
    """

    def __init__(self, world: World, told: Told) -> None:
        self._world = world
        self._told = told
        self._store = Store(world.store_uri)
        self.faults: list[str] = []
        self._check()

    @property
    def picture(self) -> Path:
        """The histogram of the confidence with the bars, and the reliability curve."""
        return self._world.folder / "confidence.png"

    @cached_property
    def batch(self) -> BatchRef:
        """The ingested batch."""
        return BatchRef.from_dict(self._told.outputs["ingest"])

    @cached_property
    def quarantine(self) -> Rows:
        """The rejected messages."""
        return self._rows(self.batch, "quarantine")

    @cached_property
    def routed(self) -> dict[str, Rows]:
        """Route → the rows that ended there, with what was finally decided: what a person held is on hold."""
        found = {name: self._rows(BatchRef.from_dict(ref), name) for name, ref in self._told.outputs["decide"].items()}
        reviewed = {row[ROW_ID]: row["decision"] for row in self.reviewed}
        asked = found["review"]
        for row in asked:
            row["decision"] = reviewed.get(row[ROW_ID])
        found["review"] = [row for row in asked if row["decision"] is not None]
        found["hold"] += [row for row in asked if row["decision"] is None]
        return found

    @cached_property
    def reviewed(self) -> Rows:
        """The rows that a person decided."""
        reference = self._told.outputs.get("review")
        return self._rows(BatchRef.from_dict(reference), "reviewed") if reference else []

    @cached_property
    def effects(self) -> list[Entry]:
        """What the ledger says was done outside, undos left out."""
        entries = open_ledger(self._world.ledger_url).entries(DAG_ID, run_id=self._told.run_id)
        return [entry for entry in entries if not entry.undoes]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The facts as ``summary.json`` holds them."""
        counts = self.batch.counts
        predictions = BatchRef.from_dict(self._told.outputs["infer"]).counts
        states = Counter(entry.state for entry in self.effects)
        pin = self._told.outputs["pin"]
        return {
            "read": counts["read"],
            "accepted": counts["accepted"],
            "quarantined": dict(sorted(Counter(_code(row) for row in self.quarantine).items())),
            "predicted": predictions["predicted"],
            "failed": predictions["failed"],
            "routes": {route: len(self.routed[route]) for route in ROUTES},
            "actions": {
                "sent": sum(1 for entry in self.effects if entry.attempts),
                **{state: states.get(state, 0) for state in STATES},
            },
            "model": {"name": pin["name"], "version": pin["version"], "digest": pin["digest"]},
            "run_id": self._told.run_id,
            "seconds": self._told.seconds,
        }

    def write(self) -> None:
        """Write ``summary.json`` and the picture into the demo's folder."""
        path = self._world.folder / "summary.json"
        path.write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")
        rows = [row for route in ROUTES for row in self.routed[route]]
        manifest = self._store.manifest(BatchRef.from_dict(self._told.outputs["decide"]["act"]))
        draw_report(
            [float("nan") if row["confidence"] is None else row["confidence"] for row in rows],
            Policy.from_dict(manifest.facts["policy"]),
            self.picture,
            [row["prediction"] == self._truth(row) for row in rows],
        )

    def accuracy(self) -> Rows:
        """Return, route by route, how often model and decision were right about unseen biopsies."""
        lines = []
        for route in ROUTES:
            rows = self.routed[route]
            decided = [row for row in rows if row["decision"] is not None]
            right = sum(row["prediction"] == self._truth(row) for row in rows)
            kept = sum(row["decision"] == self._truth(row) for row in decided)
            lines.append({"route": route, "rows": len(rows), "right": right, "decided": len(decided), "kept": kept})
        return lines

    def show(self, console: Console) -> None:
        """Print the table, the accuracies, where the pictures are and how to go on looking."""
        console.print(self._counts(), self._accuracies(), sep="\n")
        login, folder = self._world.airflow.login, self._world.folder
        for what, where in (
            ("Airflow", f"{self._world.airflow.address}  log in as {login.user} with password {login.password}"),
            ("MLflow", f"{self._world.mlflow}  no login"),
            ("Tickets", f"{self._world.tickets}/tickets  no login"),
            ("Picture", f"{self.picture}  how sure the model is, and how right"),
            ("Facts", f"{folder / 'summary.json'}, {folder / 'truth.json'}"),
        ):
            console.print(Text(f"{what:<8} {where}"))
        console.print(Text("The servers stay up until  make stop"))
        if self.faults:
            console.print(Text("\nThese facts do not agree:", style="bold red"))
            for fault in self.faults:
                console.print(Text(f"  {fault}", style="red"))
            console.print(Text(f"Read the tasks' logs in {folder / 'airflow' / 'logs'}"))

    def _counts(self) -> Table:
        said = self.summary
        actions = Counter((entry.action, entry.state) for entry in self.effects)
        held = sum(row["route"] == "review" for row in self.routed["hold"])
        notes = {"review": "answered by a person", "hold": f"a person held {held}"}
        model = f"{said['model']['name']} version {said['model']['version']}"
        table = Table(title=f"{DAG_ID}, run {self._told.run_id}, model {model}")
        table.add_column("stage")
        table.add_column("rows", justify="right")
        table.add_column("of which")
        quarantined = ", ".join(f"{code} {count}" for code, count in said["quarantined"].items())
        table.add_row("read", str(said["read"]), "")
        table.add_row("  accepted", str(said["accepted"]), "")
        table.add_row("  quarantined", str(sum(said["quarantined"].values())), quarantined)
        table.add_row("predicted", str(said["predicted"]), f"failed {said['failed']}")
        for route in ROUTES:
            table.add_row(f"  {route}", str(said["routes"][route]), notes.get(route, ""))
        for action in dict.fromkeys(entry.action for entry in self.effects):
            states = {state: actions[action, state] for state in STATES if actions[action, state]}
            note = ", ".join(f"{'undone' if state == 'compensated' else state} {n}" for state, n in states.items())
            table.add_row(f"{action}s sent", str(sum(states.values())), note)
        return table

    def _accuracies(self) -> Table:
        table = Table(title="Right about biopsies that nobody had seen")
        table.add_column("route")
        for title in ("rows", "model right", "decided", "decision right"):
            table.add_column(title, justify="right")
        for line in self.accuracy():
            model, decision = _share(line["right"], line["rows"]), _share(line["kept"], line["decided"])
            table.add_row(line["route"], str(line["rows"]), model, str(line["decided"]), decision)
        return table

    def _truth(self, row: dict[str, Any]) -> str:
        return self._told.labels[row["biopsy_id"]]

    def _rows(self, ref: BatchRef, table: str) -> Rows:
        return [row for part in self._store.read(ref, table) for row in part.to_pylist()]

    def _check(self) -> None:
        said = self.summary
        quarantined, routed, actions = said["quarantined"], said["routes"], said["actions"]
        self._demand("messages published", self._told.published, "read", said["read"])
        self._demand("read", said["read"], "accepted + quarantined", said["accepted"] + sum(quarantined.values()))
        self._demand("accepted", said["accepted"], "predicted + failed", said["predicted"] + said["failed"])
        self._demand("predicted", said["predicted"], "the routes together", sum(routed.values()))
        self._demand("sent", actions["sent"], " + ".join(STATES), sum(actions[state] for state in STATES))
        self._check_quarantine()
        self._check_rows()
        self._check_effects()

    def _check_quarantine(self) -> None:
        """Compare every spoiled message with what became of it, not only their numbers."""
        truth = {(s["topic"], s["partition"], s["offset"]): s["kind"] for s in self._told.spoiled}
        found = {(r["_topic"], r["_partition"], r["_offset"]): _code(r) for r in self.quarantine}
        for place in sorted(truth.keys() | found.keys()):
            if truth.get(place) != found.get(place):
                self.faults.append(
                    f"{place}: spoiled by {truth.get(place, 'nobody')}, quarantined for {found.get(place, 'nothing')}"
                )

    def _check_rows(self) -> None:
        places = Counter(row[ROW_ID] for rows in self.routed.values() for row in rows)
        accepted = Counter(row[ROW_ID] for row in self._rows(self.batch, "accepted"))
        if places != accepted:
            lost, doubled = accepted - places, places - accepted
            self.faults.append(f"rows lost between ingest and routes: {dict(lost)}; doubled: {dict(doubled)}")

    def _check_effects(self) -> None:
        """Ask the service what it really did."""
        decided = sum(row["decision"] is not None for rows in self.routed.values() for row in rows)
        tickets = [entry for entry in self.effects if entry.action == "ticket"]
        self._demand("rows decided", decided, "tickets asked for", len(tickets))
        standing = Counter(entry.subject for entry in tickets if entry.state == "done")
        for what, ours in (("tickets", standing), ("pages", self._done("page"))):
            theirs = Counter(item["subject"] for item in self._ask(what))
            if ours != theirs:
                self.faults.append(
                    f"{what}: the ledger has {ours.total()}, the service {theirs.total()}; "
                    f"only in the ledger: {dict(ours - theirs)}, only at the service: {dict(theirs - ours)}"
                )

    def _done(self, action: str) -> Counter[str]:
        return Counter(entry.subject for entry in self.effects if entry.action == action and entry.state == "done")

    def _ask(self, what: str) -> Rows:
        with urllib.request.urlopen(f"{self._world.tickets}/{what}", timeout=15) as answer:
            found: Rows = json.load(answer)
        return found

    def _demand(self, one: str, count: int, other: str, found: int) -> None:
        if count != found:
            self.faults.append(f"{one} is {count}, but {other} is {found}")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _code(row: dict[str, Any]) -> str:
    return str(row["_reasons"][0]).partition(":")[0]
