"""Choosing: a table of the sizes of a nesting with what each costs and how good it is, and the pick for a budget.

Read in this order:

- `family`: the table, the pick for a budget, and the JSON beside the nesting.
- `report_page`: the table as a page to choose on, in one HTML file.
- `survey`: makes the table.
- `searching`: which sizes are evaluated where there are too many for all.
- `measuring`: parameters, memory and latency of plain modules. `matrix_products`: their FLOPs.
"""

from matta.choosing.family import Family, Size
from matta.choosing.survey import family

__all__ = ["Family", "Size", "family"]
