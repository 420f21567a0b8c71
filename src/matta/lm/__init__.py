"""Language models: from text and a recipe to a co-trained family of Transformers folders, and its judgement.

Read in this order:

- `recipe`, checked by `typed_tables`: what a run trains, on what, and how. `recipe_files`: read from TOML, with values
  replaced. `command_settings`: options of the commands.
- `text_files`, `documents`, `tokens`, `corpora`: text from files or the hub, as documents, as token ids, kept.
- `packing`, `permutations`: batches of packed blocks in a shuffled order. `text_streaming`, `lanes`: text too large for
  the memory.
- `decoders`: Student and TA of a recipe, nested. `costs`, `gpu_memory` and `planning`: `matta plan`.
- `recipe_training`: `matta train`. `continued_runs`: what may change when it resumes. `run_notes`: what it tells of
  its recipe. `trained_runs`: what its folder holds. `run_listing`: `matta runs`.
- `teacher_labels`, `teaching`: a Teacher's likeliest tokens, stored once by `matta teach`.
- `extracting`, `configurations`, `folders`, `cards`, `modeling_matta`: `matta extract`, and Transformers folders.
  `streamed_folders`: their weights written from a file, piece by piece.
- `choosing_sizes`: `matta choose`. `run_report`: `matta report`.
- `drafting`: the Student drafts and the TA verifies, in Transformers' assisted generation.
- `bits_per_byte`, `judging`, `benchmarks`, `benchmark_tables`: `matta evaluate`.
- `needed`: the extra `lm`, named by an error where it is not installed.
"""
