"""Command lines that are wrong in themselves."""

from __future__ import annotations

import os
from pathlib import Path

from bad_cases import Case, nothing, write

from matta.serving.serving_command import named_serving


def _case(name: str, run: str, line: str) -> Case:
    return Case(name, nothing, run, line)


def _serve_here(folder: Path) -> object:
    os.chdir(folder)
    return named_serving("raises:serving")


CASES = [
    _case("no command", "", r"required: COMMAND"),
    _case("unknown command", "trian {w}/recipe.toml", r"invalid choice: 'trian'"),
    _case("plan without a recipe", "plan", r"required: RECIPE"),
    _case("plan of this folder", "plan .", r"there is no recipe \."),
    _case("plan of the folder above", "plan ..", r"there is no recipe \.\."),
    _case("plan of the root", "plan /", r"there is no recipe /"),
    _case("plan of an empty name", "plan recipe/", r"there is no recipe recipe"),
    _case(
        "unknown option",
        "plan {w}/recipe.toml --deep",
        r"plan: unrecognized arguments: --deep; see matta plan --help",
    ),
    _case("misspelt option", "runs --foldr {w}", r"matta runs: unrecognized arguments: --foldr, did you mean --folder"),
    _case("train of nothing", "train {w}/none", r"there is no recipe .*none; .* has: recipe"),
    _case("resume of nothing", "train {w}/recipe.toml --resume", r"--resume without --out"),
    _case("out is a file", "train {w}/recipe.toml --out {w}/recipe.toml", r"recipe\.toml"),
    _case("out is another folder", "train {w}/recipe.toml --out {w}/nesting", r"nesting"),
    _case("runs of nothing", "runs --folder {w}/none", r"none is no folder; expected one with runs"),
    _case("no processes", "train {w}/recipe.toml --processes 0", r"processes"),
    _case("teach without a teacher", "teach {w}/recipe.toml --out {w}/t", r"required: --teacher"),
    _case("teach of no tokens", "teach {w}/recipe.toml --teacher {w}/model --out {w}/t --top 0", r"top=0: expected"),
    _case("teach of a word", "teach {w}/recipe.toml --teacher {w}/model --out {w}/t --top few", r"invalid int value"),
    _case("teach by no model", "teach {w}/recipe.toml --teacher {w}/data --out {w}/t", r"holds no tokenizer"),
    _case("teach into a file", "teach {w}/recipe.toml --teacher {w}/model --out {w}/recipe.toml", r"recipe\.toml"),
    _case("extract of nothing", "extract {w}/none", r"none holds no run of matta train"),
    _case("extract of a nesting", "extract {w}/nesting", r"holds no run of matta train"),
    _case("extract of a file", "extract {w}/recipe.toml", r"holds no run of matta train"),
    _case("extract of an unknown model", "extract {w}/run big", r"received 'big'; expected student, ta, family"),
    _case("extract of too many layers", "extract {w}/run k=3", r"received k=3; expected 0 to 2"),
    _case("extract of minus one", "extract {w}/run k=-1", r"received 'k=-1'; expected"),
    _case("extract of no layer", "extract {w}/run transformer.h.9=wide", r"received 'transformer.h.9=wide'"),
    _case("extract into a file", "extract {w}/run --out {w}/recipe.toml", r"recipe\.toml"),
    _case("choose without a budget", "choose {w}/nesting", r"no budget; expected --latency-ms"),
    _case("choose of less than nothing", "choose {w}/nesting --parameters -1", r"a budget that is not over zero"),
    _case("choose of what does not fit", "choose {w}/nesting --parameters 1", r"none of the 2 sizes has parameters=1"),
    _case("choose of what was not measured", "choose {w}/nesting --latency-ms 1", r"no latency was measured"),
    _case("choose of another batch", "choose {w}/nesting --parameters 30 --batch-size 3", r"batch_size=3 was not"),
    _case("choose of nothing", "choose {w}/none --parameters 1", r"none"),
    _case("choose of a folder", "choose {w}/data --parameters 1", r"has no family.json and is no run"),
    _case("report of a file", "report {w}/recipe.toml", r"recipe.toml"),
    _case("report into nothing", "report {w}/nesting --out {w}/none/page.html", r"none"),
    _case("report of one size", "report {w}/nesting --evaluations 1", r"evaluations"),
    _case("export as pickle", "export {w}/run student --out {w}/m --format pickle", r"--format pickle; expected onnx"),
    _case("export in 8 bits", "export {w}/run ta --out {w}/m --format safetensors --int8", r"--int8 is for"),
    _case("export of nothing", "export {w}/none student --out {w}/m", r"holds no run of matta train"),
    _case("export of an unknown model", "export {w}/run big --out {w}/m", r"received 'big'"),
    _case("serve of nothing", "serve {w}/none", r"expected a folder of a run"),
    _case("serve of no module", "serve no_such_module:name", r"there is no module 'no_such_module'"),
    _case("serve of no name", "serve json:serving", r"json has no 'serving'"),
    _case("serve of another thing", "serve json:__name__", r"is of type str; expected a matta.Serving"),
    _case("serve of a function of another thing", "serve os:getcwd", r"is of type str; expected a matta.Serving"),
    _case("serve of a function with arguments", "serve json:dumps", r"json:dumps fails with TypeError"),
    _case("serve of a relative module", "serve .name:serving", r"\.name:serving fails with TypeError"),
    _case("serve of a nesting", "serve {w}/nesting", r"holds no run of matta train"),
    _case("serve on no port", "serve {w}/run --port 70000", r"port"),
    _case("serve of no family", "serve {w}/run --family {w}/none.json", r"there is no family in"),
    _case("serve of a split without a log", "serve {w}/run --split A=1,B=1", r"split without a log"),
    _case("serve of a split without shares", "serve {w}/run --split A,B --log {w}/l", r"A,B"),
    _case("serve of nothing in the end", "serve {w}/run --timeout-s nan", r"timeout_s"),
    _case("evaluate of nothing", "evaluate {w}/none", r"is not a folder"),
    _case("evaluate of a nesting", "evaluate {w}/nesting", r"there is no config.json"),
    _case("evaluate of no examples", "evaluate {w}/model --limit 0", r"limit=0: expected at least 1"),
    _case("evaluate by no text", "evaluate {w}/model --tasks none --text {w}/none.txt", r"none.txt"),
    _case("ab of nothing", "ab {w}/none", r"there is no log in"),
    _case("ab of no logs", "ab {w}/labels", r"teacher.json, line 1: not JSON"),
    _case("ab of one arm", "ab {w}/data/answers.jsonl --control C", r"C"),
    _case("ab of another metric", "ab {w}/data/answers.jsonl --metric loss", r"metric"),
    _case("ab of no error", "ab {w}/data/answers.jsonl --alpha 0", r"alpha"),
    _case("ab of other shares", "ab {w}/data/answers.jsonl --shares A=x", r"A=x|share"),
    _case("study of one seed", "study relevance --seeds 1", r"seeds=1: expected at least 2"),
    _case("study of nothing", "study", r"required: NAME"),
    _case("study in a file", "study relevance --quick --out {w}/recipe.toml", r"recipe\.toml"),
    _case("figure of nothing", "figure preconditioner {w}/none --layer h", r"none"),
    Case(
        "serve of a module that raises", write("raises.py", "1 / 0"), _serve_here, r"raises:serving fails with ZeroDiv"
    ),
]
