"""Evaluation of the semantic branch on held-out pairs during its run."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cat_fast.dual_token.codebook import usage
from cat_fast.dual_token.semantic.model import SemanticModel
from cat_fast.dual_token.semantic.reverse_qformer import state_loss
from cat_fast.dual_token.semantic.text_target import TextTarget
from cat_fast.training.config.dual_token import PairDataConfig
from cat_fast.training.dual_token.pairs import held_out_pairs
from cat_fast.training.metrics.held_out_evaluation import SECONDS

CANDIDATES = 100
"""Number of held-out pairs among which an image's text is retrieved; fewer if there are fewer."""
_BATCH = 32


class SemanticEvaluation:
    """Held-out pairs with different captions."""

    def __init__(self, data: PairDataConfig, count: int, target: TextTarget, device: torch.device) -> None:
        self.images, captions = held_out_pairs(data, max(count, CANDIDATES))
        self.texts = [states.to(device) for states in target.states(captions)]
        self.sizes = torch.tensor([len(states) for states in self.texts], device=device)
        self.device = device

    @torch.no_grad()
    def evaluate(self, model: SemanticModel, stage: str) -> dict[str, float]:
        """Return the metrics of a stage.

        Contrastive: retrieval at rank 1. Codes: the mean cosine similarity of decoded and true embeddings,
        the error and cosine similarity of text states predicted for their true number, the share of images
        whose number is right, and the use of the codebook.
        """
        started = time.perf_counter()
        found = self._evaluate(model, stage)
        return found | {SECONDS: round(time.perf_counter() - started, 4)}

    def _evaluate(self, model: SemanticModel, stage: str) -> dict[str, float]:
        batches = [batch.to(self.device) for batch in self.images.split(_BATCH)]
        if stage == "contrastive":
            images = torch.cat([model.embed_images(batch) for batch in batches])[:CANDIDATES]
            texts = model.embed_texts(self.texts[:CANDIDATES])
            best = (images @ texts.T).argmax(1)
            right = (best == torch.arange(len(images), device=best.device)).float().mean().item()
            return {"held_out/retrieval_at_1": right, "held_out/candidates": float(len(images))}
        counts = torch.zeros(model.codebook_size, dtype=torch.int64)
        decoded: list[Tensor] = []
        states: list[Tensor] = []
        exact: list[Tensor] = []
        for batch, sizes in zip(batches, self.sizes.split(_BATCH), strict=True):
            embeddings = model.causal_embeddings(batch)
            codes = model.quantizer.nearest(model.to_code(embeddings))
            back = model.code_decoder(model.quantizer.lookup(codes))
            decoded.append(F.cosine_similarity(back, embeddings, dim=-1).mean(1))
            predicted, lengths = model.reverse_qformer(back, sizes)
            states.append(predicted)
            if lengths is not None:
                exact.append(lengths.argmax(1) + 1 == sizes)
            counts += torch.bincount(codes.flatten().cpu(), minlength=model.codebook_size)
        error, _, similarity = state_loss(torch.cat(states), None, self.texts)
        used = usage(counts)
        return {
            "held_out/embedding_cosine": torch.cat(decoded).mean().item(),
            "held_out/state_mse": error.item(),
            "held_out/state_cosine": similarity.item(),
            **({"held_out/lengths_exact": torch.cat(exact).float().mean().item()} if exact else {}),
            "held_out/codes_used": used.share,
            "held_out/perplexity": used.perplexity,
        }
