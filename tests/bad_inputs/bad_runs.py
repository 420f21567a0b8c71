"""Folders of runs and of extracted models that are damaged, or bring what must not be run."""

from __future__ import annotations

from pathlib import Path

from bad_cases import Case, Damage, cut, edit, flip, remove, unlisted, write

SIGN = "SIGN-OF-LIFE"
HOSTILE = f"import pathlib\npathlib.Path({SIGN!r}).touch()\nraise SystemExit(7)\n"
CODE = {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"}


def _extract(name: str, damage: Damage, line: str, more: str = "") -> Case:
    return Case(name, damage, f"extract {{w}}/run {more}", line)


def _both(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for each in damages:
            each(folder)

    return damage


def _tokenizer(damage: Damage) -> Damage:
    return unlisted("run/tokenizer", damage)


def _config(damage: Damage) -> Damage:
    return unlisted("run/configs/ta", damage)


CASES = [
    _extract("recipe gone", remove("run/recipe.json"), r"holds no run of matta train: there is no recipe.json"),
    _extract("recipe cut off", cut("run/recipe.json"), r"recipe.json is damaged"),
    _extract("recipe is a list", write("run/recipe.json", "[1, 2]"), r"recipe.json"),
    _extract("recipe is deep", write("run/recipe.json", "[" * 100_000), r"recipe.json is damaged"),
    _extract("recipe is not UTF-8", write("run/recipe.json", b'{"name": "\xff"}'), r"recipe.json is damaged"),
    _extract("recipe of another version", edit("run/recipe.json", new_key=1), r"recipe.json: .*new_key"),
    _extract("tokenizer cut off", cut("run/tokenizer/tokenizer.json"), r"tokenizer.json is damaged: its checksum"),
    _extract("tokenizer cut off, unlisted", _tokenizer(cut("run/tokenizer/tokenizer.json")), r"tokenizer is damaged"),
    _extract("its settings cut off", cut("run/tokenizer/tokenizer_config.json"), r"tokenizer_config.json is damaged"),
    _extract(
        "its settings cut off, unlisted",
        _tokenizer(cut("run/tokenizer/tokenizer_config.json")),
        r"tokenizer is damaged",
    ),
    _extract("tokenizer gone", remove("run/tokenizer/tokenizer.json"), r"tokenizer.json cannot be read"),
    _extract("tokenizer gone, unlisted", _tokenizer(remove("run/tokenizer/tokenizer.json")), r"tokenizer"),
    _extract("tokenizer is a list", _tokenizer(write("run/tokenizer/tokenizer.json", "[]")), r"tokenizer is damaged"),
    _extract(
        "its settings are a list",
        _tokenizer(write("run/tokenizer/tokenizer_config.json", "[]")),
        r"tokenizer is damaged",
    ),
    _extract(
        "tokenizer with code",
        _tokenizer(
            _both(
                edit(
                    "run/tokenizer/tokenizer_config.json",
                    auto_map={"AutoTokenizer": ["hostile.T", None]},
                    tokenizer_class="T",
                ),
                write("run/tokenizer/hostile.py", HOSTILE),
            )
        ),
        r"tokenizer is damaged",
    ),
    _extract("configuration cut off", cut("run/configs/ta/config.json"), r"config.json is damaged: its checksum"),
    _extract("configuration cut off, unlisted", _config(cut("run/configs/ta/config.json")), r"ta is damaged"),
    _extract("configuration is a list", _config(write("run/configs/ta/config.json", "[]")), r"ta is damaged"),
    _extract("configuration gone", _config(remove("run/configs/ta/config.json")), r"ta is damaged"),
    _extract(
        "configuration with code",
        _config(
            _both(
                edit("run/configs/ta/config.json", auto_map=CODE, model_type="hostile"),
                write("run/configs/ta/hostile.py", HOSTILE),
            )
        ),
        r"ta is damaged",
    ),
    _extract("another architecture", _config(edit("run/configs/ta/config.json", model_type="gpt9")), r"ta is damaged"),
    _extract("a class that is none", _config(edit("run/configs/ta/config.json", model_type="vit")), r"vit|decoder"),
    _extract("other sizes", _config(edit("run/configs/ta/config.json", n_inner=24)), r"does not fit"),
    _extract("sizes that are text", _config(edit("run/configs/ta/config.json", n_inner="wide")), r"ta|n_inner|gpt2"),
    _extract("sizes beyond all memory", _config(edit("run/configs/ta/config.json", n_embd=1 << 40)), r"ta|fit|built"),
    _extract("plan cut off", cut("run/nested/nested.json"), r"nested.json is damaged: its checksum"),
    _extract("weights cut off", cut("run/nested/nested.safetensors"), r"nested.safetensors cannot be read"),
    _extract("weights flipped", flip("run/nested/nested.safetensors", 0.9), r"safetensors is damaged", "--check"),
    _extract("weights gone", remove("run/nested/nested.safetensors"), r"nested.safetensors cannot be read"),
    _extract("results cut off", cut("run/results.json"), r"results.json is damaged"),
    _extract("results are a number", write("run/results.json", "7"), r"results.json is damaged"),
    Case(
        "export of damaged weights", flip("run/nested/nested.safetensors"), "export {w}/run ta --out {w}/m", r"damaged"
    ),
    Case("serve of damaged weights", flip("run/nested/nested.safetensors"), "serve {w}/run", r"damaged"),
    Case("serve of a damaged tokenizer", cut("run/tokenizer/tokenizer.json"), "serve {w}/run", r"damaged"),
    Case(
        "figure without factors", write("run/nothing", ""), "figure preconditioner {w}/run --layer h", r"preconditioner"
    ),
    Case(
        "figure of damaged factors",
        write("run/preconditioner.safetensors", b"\xff" * 99),
        "figure preconditioner {w}/run --layer h",
        r"preconditioner.safetensors",
    ),
    # --- folders of extracted models
    Case(
        "model flipped",
        flip("model/model.safetensors", 0.9),
        "teach {w}/recipe.toml --teacher {w}/model --out {w}/t",
        r"model.safetensors is damaged",
    ),
    Case(
        "model cut off",
        unlisted("model", cut("model/model.safetensors")),
        "teach {w}/recipe.toml --teacher {w}/model --out {w}/t",
        r"cannot be loaded",
    ),
    Case(
        "model without weights",
        unlisted("model", remove("model/model.safetensors")),
        "teach {w}/recipe.toml --teacher {w}/model --out {w}/t",
        r"cannot be loaded",
    ),
    Case(
        "model of another class",
        unlisted("model", edit("model/config.json", model_type="vit")),
        "teach {w}/recipe.toml --teacher {w}/model --out {w}/t",
        r"cannot be loaded",
    ),
    Case(
        "model with code",
        unlisted(
            "model",
            _both(edit("model/config.json", auto_map=CODE, model_type="hostile"), write("model/hostile.py", HOSTILE)),
        ),
        "teach {w}/recipe.toml --teacher {w}/model --out {w}/t",
        r"cannot be loaded",
    ),
    Case(
        "student with code",
        unlisted(
            "model",
            _both(edit("model/config.json", auto_map=CODE, model_type="hostile"), write("model/hostile.py", HOSTILE)),
        ),
        "plan {w}/recipe.toml model.pretrained={w}/model model.student={} model.ta={n_layer=2}",
        r"cannot be loaded",
    ),
    Case(
        "judged model with code",
        write("model/hostile.py", HOSTILE),
        "evaluate {w}/model --tasks none --text {w}/data/text.txt",
        r"not run unasked",
    ),
    Case(
        "judged model is a list",
        unlisted("model", write("model/config.json", "[]")),
        "evaluate {w}/model --tasks none --text {w}/data/text.txt",
        r"config.json",
    ),
    Case(
        "judged model cut off",
        unlisted("model", cut("model/config.json")),
        "evaluate {w}/model --tasks none --text {w}/data/text.txt",
        r"config.json is damaged",
    ),
    Case(
        "judged model flipped",
        flip("model/model.safetensors", 0.9),
        "evaluate {w}/model --tasks none --text {w}/data/text.txt",
        r"model.safetensors is damaged",
    ),
]
