"""Questions that begin alike run once: a tree of tokens on one key-value cache.

Every token of the tree sees the trunk and its own ancestors only, at the position it would have in its own sequence, so
that the logits are those of each sequence run alone. A trunk (images and what stands before the questions) is prefilled
once and serves every later tree. Source of the attention mask: SpecInfer, Miao et al. 2023, arXiv:2305.09781, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

TRUNK = -1


class Tree:
    """embeds: (1, L, lm_dim) of the trunk."""

    def __init__(self, lm, embeds: Tensor):
        self.lm, self.length = lm, embeds.shape[1]
        self.cache = lm(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values
        self._empty()

    @property
    def exact(self) -> bool:
        """Whether every layer keeps plain keys and values; windows and recurrent states see more than a node's ancestors."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def _empty(self) -> None:
        self.depth: list[int] = []
        self.seen = np.zeros((0, 0), bool)

    def cut(self) -> None:
        """Back to the trunk."""
        if self.depth:
            self.cache.crop(-len(self.depth))
        self._empty()

    def grow(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """(n, V) logits after each new token. parents: of each, TRUNK or a node's index, also of this very call."""
        old, count = len(self.depth), len(tokens)
        seen = np.zeros((old + count, old + count), bool)
        seen[:old, :old] = self.seen
        for i, parent in enumerate(parents, start=old):
            if parent != TRUNK:
                seen[i] = seen[parent]
            seen[i, i] = True
            self.depth.append(0 if parent == TRUNK else self.depth[parent] + 1)
        self.seen = seen
        device, dtype = self.lm.device, self.lm.dtype
        mask = torch.zeros(1, 1, count, self.length + old + count, dtype=dtype, device=device)
        mask[0, 0, :, self.length :].masked_fill_(torch.from_numpy(~seen[old:]).to(device), torch.finfo(dtype).min)
        places = torch.tensor([self.depth[old:]], device=device) + self.length
        ids = torch.tensor([list(tokens)], device=device)
        return self.lm(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=self.cache, use_cache=True).logits[0]

    def plant(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[list[int]]]:
        """Token sequences that follow the trunk, common beginnings once: logits of all nodes, and each row's nodes."""
        nodes: dict[tuple[int, int], int] = {}
        parents, tokens, paths = [], [], []
        for row in rows:
            at, path = TRUNK, []
            for token in row:
                if (at, token) not in nodes:
                    nodes[at, token] = len(tokens)
                    parents.append(at)
                    tokens.append(token)
                at = nodes[at, token]
                path.append(at)
            paths.append(path)
        return self.grow(parents, tokens), paths

    def score(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
        """(len(prompts),) log probability of each answer after its prompt; prompts hold at least one token."""
        logits, paths = self.plant([[*p, *a[:-1]] for p, a in zip(prompts, answers)])
        at = torch.tensor([n for p, path in zip(prompts, paths) for n in path[len(p) - 1 :]], device=logits.device)
        token = torch.tensor([t for a in answers for t in a], device=logits.device)
        chance = logits[at].float().log_softmax(-1).gather(1, token[:, None])[:, 0]
        self.cut()
        return torch.stack([part.sum() for part in chance.split([len(a) for a in answers])])

    def write(self, prompts: Sequence[Sequence[int]], most: int, end: int, never: Sequence[int], temperature: float = 0.0) -> list[list[int]]:
        """Answers of at most ``most`` tokens, without ``end``, greedy or drawn at a temperature; tokens in ``never`` are not written."""
        logits, paths = self.plant(prompts)
        tips = [path[-1] for path in paths]
        answers: list[list[int]] = [[] for _ in prompts]
        last, open_rows = logits[torch.tensor(tips, device=logits.device)], list(range(len(prompts)))
        for step in range(most):
            last[:, list(never)] = -torch.inf
            chosen = ((last / temperature).softmax(-1).multinomial(1)[:, 0] if temperature else last.argmax(-1)).tolist()
            kept = [(row, token) for row, token in zip(open_rows, chosen) if token != end]
            for row, token in kept:
                answers[row].append(token)
            open_rows = [row for row, _ in kept]
            if not kept or step == most - 1:
                break
            start = len(self.depth)
            last = self.grow([tips[row] for row in open_rows], [token for _, token in kept])
            for k, row in enumerate(open_rows):
                tips[row] = start + k
        self.cut()
        return answers
