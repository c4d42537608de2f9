"""The commands ``airflow ai …``: lint and plan pipelines, explain decisions, quarantine and claims.

Invariants: importing this loads no library of ours (each ``airflow`` command imports it); commands read only, but
``quarantine replay`` and ``claims release``, which say what they do.
"""

from __future__ import annotations

from airflow.cli.cli_config import CLICommand, GroupCommand

from airflow_ai_provider.cli.claim import claims_command
from airflow_ai_provider.cli.pin import pins_command
from airflow_ai_provider.cli.pipeline import lint_command, plan_command
from airflow_ai_provider.cli.quarantine import quarantine_command
from airflow_ai_provider.cli.story import explain_command


def get_cli_commands() -> list[CLICommand]:
    """Return the commands, as Airflow's provider discovery asks for them."""
    return [
        GroupCommand(
            name="ai",
            help="Lint, plan and explain AI pipelines; mend what was quarantined",
            description="Commands of the provider airflow-ai-provider.",
            subcommands=(
                lint_command(),
                plan_command(),
                explain_command(),
                quarantine_command(),
                claims_command(),
                pins_command(),
            ),
        )
    ]
