"""Choosing: a table of the sizes of a nesting with what each costs and how good it is, and the pick for a budget.

Read in this order:

- `family`: `family` makes the table, `Family` picks from it and keeps it as JSON beside the nesting.
- `searching`: which sizes are evaluated where there are too many for all.
- `measuring`: parameters, FLOPs, memory and latency of plain modules.
"""

from matta.choosing.family import Family, Size, family

__all__ = ["Family", "Size", "family"]
