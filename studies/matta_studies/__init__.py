"""Studies: the paper's experiments on data that anybody can get (`matta study …`).

A study is its data, its models, its arms and its prose. What all studies do is written once: an arm is tuned with as
many trials as any other, runs with fresh seeds on two worker processes that keep a journal, and is compared with a
baseline seed by seed; tables, notes and a picture tell what was found, and what was not.

Read in this order:

- `study_settings`: what the command line asks for, without torch.
- `intervals`, `tuning`, `worker_pool`, `journal`: a paired change, the best trial, jobs on processes, a stopped study.
- `trials`: what is tuned, and the one training loop.
- `experiment`: arms, plans, fresh seeds, what was found, and the run folder.
- `presentation`: tables, notes and pictures. `language_report`, `ablations_report` and `compute_report` use them.
- `labelled_films`, `event_streams`, `rankers`: data and models of the two case studies.
- `relevance`, `ranking`, `quality`, `language`: four studies. What was laid down before the fresh seeds were run (arms,
  trials, settings) is in `relevance_plan`, `quality_plan` and `language_plan`.
- `ablation_variants`, `ablations`: one change at a time, on both case studies.
- `compute`: the family against its sizes trained alone, at equal processor time or with short data; what it trains is
  in `compute_tasks` and `compute_text`, and how in `compute_training`.
- `preconditioner_figure`: the picture of Shampoo's factors (Fig. 4).
"""
