"""Co-train a GPT-2 in the Transformers Trainer, then save the Student: `python examples/transformers_trainer.py`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import matta


class CoTrainer(Trainer):
    """The Trainer, for a CoTraining as the model; a step is the mean over its labels in all batches and processes.

    Evaluation weighs batches by their examples, whatever labels they ignore: `matta.Evaluation` weighs by labels.
    """

    loss_is_scaled_for_ga = True

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(*arguments)
        return batches, self.model.num_labels(batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        out = model(inputs, num_labels=num_items_in_batch)
        return (out.loss, {"logits": out.student_logits}) if return_outputs else out.loss


def gpt2(*, layers: int, inner: int) -> GPT2LMHeadModel:
    """A GPT-2 far too small for any use."""
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 32, "n_layer": layers, "n_head": 2, "n_inner": inner}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def main() -> None:
    """Train on counting modulo 32, then load the Student in the stock class."""
    torch.manual_seed(0)
    tokens = (torch.randint(32, (512, 1)) + torch.arange(16)) % 32
    examples = [{"input_ids": row, "labels": row} for row in tokens]
    nested = matta.nest(gpt2(layers=1, inner=32), gpt2(layers=2, inner=64), layers={"transformer.h": "first"})
    cotrain = matta.CoTraining(nested, matta.objectives.CausalLM(), ramp=matta.Ramp(start=10, steps=20))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=60,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            remove_unused_columns=False,  # the Trainer would look for their names in CoTraining.forward
            label_names=["labels"],  # likewise
            save_strategy="no",  # it would save the CoTraining; the models are saved below
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        trainer = CoTrainer(cotrain, arguments, train_dataset=examples, eval_dataset=examples[:64])
        trainer.train()
        print(f"loss of the pair after training: {trainer.evaluate()['eval_loss']:.3f}")
        matta.save(nested, f"{folder}/nested")
        matta.extract(nested).save_pretrained(f"{folder}/student")
        student = GPT2LMHeadModel.from_pretrained(f"{folder}/student").eval()
    counted = student.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    print("the Student goes on counting:", counted[0].tolist())


if __name__ == "__main__":
    main()
