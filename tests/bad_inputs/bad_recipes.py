"""Recipes that are no TOML, or say what cannot be."""

from __future__ import annotations

from bad_cases import Case, Damage, cut, nothing, write


def _plan(name: str, damage: Damage, line: str, overrides: str = "") -> Case:
    return Case(name, damage, f"plan {{w}}/recipe.toml {overrides}", line)


CASES = [
    _plan("cut off", cut("recipe.toml", 0.3), r"recipe.toml"),
    _plan("empty", write("recipe.toml", ""), r"expected|missing|model"),
    _plan("no TOML", write("recipe.toml", "{'model': 1}"), r"is not TOML"),
    _plan("not UTF-8", write("recipe.toml", b"name = '\xff'"), r"is not TOML"),
    _plan("binary", write("recipe.toml", bytes(range(256))), r"is not TOML"),
    _plan("deep", write("recipe.toml", "a = " + "[" * 5000 + "]" * 5000), r"is not TOML"),
    _plan("a number of many digits", nothing, r"steps", "train.steps=" + "9" * 5000),
    _plan("a table is a number", write("recipe.toml", "model = 3\ndata = 4\ntrain = 5\n"), r"model"),
    _plan("a date", nothing, r"steps", "train.steps=1979-05-27"),
    _plan("unknown key", nothing, r"batchs.*did you mean.*batch", "train.batchs=1"),
    _plan("unknown table", nothing, r"trian", "trian.batch=1"),
    _plan("unknown value of the model", nothing, r"n_layers", "model.student.n_layers=1"),
    _plan("unknown architecture", nothing, r"no such kind of model", "model.architecture=gpt9"),
    _plan("text for a number", nothing, r"steps", "train.steps=many"),
    _plan("a fraction for a number", nothing, r"steps", "train.steps=1.5"),
    _plan("not a number", nothing, r"learning_rate", "train.learning_rate=nan"),
    _plan("infinite", nothing, r"learning_rate", "train.learning_rate=inf"),
    _plan("nothing to do", nothing, r"steps = 0: expected 1 or more", "train.steps=0"),
    _plan(
        "two budgets",
        write("more.toml", ""),
        r"received steps=2 and tokens=5",
        "train={steps=2,tokens=5,batch=2,learning_rate=1}",
    ),
    _plan("no equals sign", nothing, r"expected KEY=VALUE", "train.steps"),
    _plan("an empty key", nothing, r"expected KEY=VALUE", "train..steps=1"),
    _plan("a value within a value", nothing, r"steps is not a table", "train.steps.more=1"),
    _plan("a TA that is too small", nothing, r"mlp|n_inner|long", "model.ta.n_inner=4"),
    _plan("heads that do not divide", nothing, r"gpt2 cannot be built: .*divisible", "model.student.n_head=3"),
    _plan("no layers", nothing, r"model|n_layer|blocks", "model.student.n_layer=-1"),
    _plan("a width of zero", nothing, r"gpt2 cannot be built", "model.student.n_embd=0"),
    _plan("a context too long", nothing, r"data.context = 99", "data.context=99"),
    _plan("too many wide layers", nothing, r"family.k: 9 layers", "family.k=[9]"),
    _plan("a layer twice", nothing, r"each once", "family.k=[1,1]"),
    _plan("an unknown rule", nothing, r"sideways|layers", "model.layers=sideways"),
    _plan("an unknown pattern", nothing, r"nothing.to.match", 'model.share=["nothing.to.match"]'),
    _plan("no such tokenizer", nothing, r"there is no './none|cannot be loaded", "data.tokenizer=./none"),
    Case("two texts", nothing, 'plan {w}/recipe.toml data.train={path="a",hub="b"}', r"path|hub"),
    Case(
        "no text", nothing, "train {w}/recipe.toml data.train={w}/none.txt --out {w}/new", r"none.txt leads to no text"
    ),
    Case(
        "other text",
        nothing,
        "train {w}/recipe.toml data.train={w}/recipe.toml --out {w}/new",
        r"expected one that ends in",
    ),
    Case("no teacher", nothing, "train {w}/recipe.toml train.teacher={w}/none --out {w}/new", r"none"),
    Case("labels of other text", nothing, "train {w}/recipe.toml train.teacher={w}/labels --out {w}/new", r"labels"),
    Case(
        "not a pretrained model",
        nothing,
        "plan {w}/recipe.toml model.pretrained={w}/data model.student={} model.ta={n_layer=2}",
        r"pretrained",
    ),
]
