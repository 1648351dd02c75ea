"""`IterativeSFTTrainer`: play, keep the best, imitate it; expert iteration, or rejection sampling.

    IterativeSFTTrainer(model, IterativeSFTConfig(output_dir="runs/isft"), environment=env, …).train()

    trainer.step(texts=[…])        # or the choice is yours: one optimizer step per batch of texts

Anthony et al. 2017, "Thinking fast and slow with deep learning and tree search"; for language models Dong et
al. 2023, "RAFT: reward ranked finetuning for generative foundation model alignment", and Singh et al. 2023,
"Beyond human data: scaling self-training for problem-solving with language models" (ReST-EM).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from etude.data.batch import Trajectory
from etude.errors import DataError
from etude.math.losses import aggregate, reinforce_loss
from etude.trainers.experience import Experience, Minibatch
from etude.trainers.group import GroupTrainer, Scores
from etude.trainers.group_config import IterativeSFTConfig


class IterativeSFTTrainer(GroupTrainer):
    """Expert iteration. The arguments are those of `GroupTrainer`."""

    method = "iterative_sft"
    config_class = IterativeSFTConfig
    kl_kind = "k1"
    config: IterativeSFTConfig

    def credit(self, scores: Scores) -> Tensor:
        """1 for the best `keep_best` episodes of each task, as far as they reach `min_reward`; else 0."""
        least = self.config.min_reward
        credit_B = torch.zeros_like(scores.scores)
        for group in scores.groups.unique():
            members = ((scores.groups == group) & scores.kept).nonzero()[:, 0]
            found = scores.scores[members]
            if least is None and not (found.numel() and found.min() < found.max()):
                continue
            best = members[found.argsort(descending=True, stable=True)[: self.config.keep_best]]
            credit_B[best] = 1.0 if least is None else (scores.scores[best] >= least).to(credit_B)
        return credit_B

    def spread(self, advantages_B: Tensor, experience: Experience) -> Tensor:
        """Whatever came when: an episode is imitated as a whole."""
        return advantages_B[:, None] * experience.mask

    def chosen(self, experience: Experience, advantages_BN: Tensor) -> Experience:
        return experience.only(advantages_BN.any(1))

    def loss(self, minibatch: Minibatch, advantages_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """−log π, a mean over the tokens of what was kept."""
        mask_BN = minibatch.observed.mask
        loss_BN = reinforce_loss(minibatch.logprobs, advantages_BN)
        loss = aggregate(loss_BN, mask_BN, mode="token", denominator=minibatch.denominator)
        return loss, torch.ones_like(loss_BN), torch.zeros_like(mask_BN)

    def step(
        self,
        input_ids: Sequence[Tensor] | None = None,
        labels: Sequence[Tensor] | None = None,
        *,
        texts: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """One optimizer step of supervised learning on what you chose.

        Args:
            input_ids: token ids [n] each; what an encoder–decoder's encoder reads.
            labels: [n] each, −100 for tokens that are not to be imitated; `input_ids` by default. Of an
                encoder–decoder, what its decoder should say to each of them [m].
            texts: instead of both; all of each text is imitated, and an end-of-sequence token after it. Not
                for encoder–decoders.

        Returns:
            The loss and the gradient's norm.

        Raises:
            DataError: there is nothing to imitate, or the arguments don't fit together.
        """
        rows = self._rows(input_ids, labels, texts)
        experience = self.learner.observe(rows, postpone=True)
        ones_BN = experience.mask.to(experience.logprobs)
        log = self.learner.update(experience, lambda part: self._loss(part, ones_BN), self._shuffles())
        self.advance_schedule()
        self.current_step += 1
        return {"loss": log.mean("loss").item()}

    def _rows(
        self,
        input_ids: Sequence[Tensor] | None,
        labels: Sequence[Tensor] | None,
        texts: Sequence[str] | None,
    ) -> list[Trajectory]:
        if self.is_encoder_decoder and (texts is not None or input_ids is None or labels is None):
            raise DataError(
                "an encoder-decoder learns to answer: pass input_ids, which its encoder reads, and labels, "
                "which its decoder should say"
            )
        if (input_ids is None) == (texts is None):
            raise DataError("step takes either texts or input_ids; pass one of them")
        if texts is not None:
            if labels is not None:
                raise DataError("labels belong to input_ids; leave them out with texts")
            end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            input_ids = [torch.tensor([*self.tokenizer(text).input_ids, *end]) for text in texts]
        assert input_ids is not None
        labels = input_ids if labels is None else labels
        if len(labels) != len(input_ids):
            raise DataError(f"step got {len(input_ids)} input_ids and {len(labels)} labels")
        rows = []
        for i, (ids, wanted) in enumerate(zip(input_ids, labels, strict=True)):
            if self.is_encoder_decoder and ids.dim() == wanted.dim() == 1:
                rows.append(self._answer(ids.cpu(), wanted.cpu()))
                continue
            if ids.dim() != 1 or ids.shape != wanted.shape:
                raise DataError(
                    f"input_ids[{i}] has shape {tuple(ids.shape)} and labels[{i}] {tuple(wanted.shape)}; "
                    "expected the same [n]"
                )
            imitated = (wanted != -100).nonzero()[:, 0]
            rows.append(Trajectory(ids.cpu(), imitated[imitated > 0].cpu(), score=0.0))
        if not any(len(row.sampled) for row in rows):
            raise DataError("nothing to imitate: no label beyond the first token of a sequence is a token")
        return rows

    def _answer(self, source: Tensor, labels: Tensor) -> Trajectory:
        """An encoder–decoder's row: its decoder is to go on from the start token with the labels."""
        start = torch.tensor(self.starts[0][:1])
        imitated = (labels != -100).nonzero()[:, 0]
        said = labels.masked_fill(labels == -100, self.tokenizer.pad_token_id or 0)  # as models shift labels
        return Trajectory(torch.cat([start, said]), imitated + 1, score=0.0, source_ids=source)
