"""The whole story on one machine: ``python -m demo`` runs it, ``python -m demo stop`` ends what it left running."""
