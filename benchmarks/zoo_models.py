"""All models of the zoo: of packages, as people write them, and those that searches found."""

import zoo_found
import zoo_fourth
import zoo_handwritten
import zoo_packages
import zoo_rankers
import zoo_searched
import zoo_third
import zoo_transformers

MODELS = tuple(
    model
    for module in (
        zoo_transformers,
        zoo_found,
        zoo_searched,
        zoo_third,
        zoo_fourth,
        zoo_packages,
        zoo_handwritten,
        zoo_rankers,
    )
    for model in module.MODELS
)
