"""Which training sentences made a prediction of a small transformer, and which of their words.

    python examples/influence_text.py

Sentences say where animals live and what they eat. The transformer is trained on them, and then
asked where one animal lives. Influences find the sentences that say so.
"""

import random

import torch
from torch import nn
from torch.nn import functional as F

import nngeo_lazy as ng
from nngeo_lazy.likelihoods import Categorical

ANIMALS = ["cat", "dog", "owl", "fox", "bee", "elk", "cow", "hen"]
PLACES = ["house", "barn", "wood", "hive", "field"]
FOOD = ["fish", "meat", "grass", "corn", "honey"]
WORDS = [".", "the", "lives", "in", "a", "eats", *ANIMALS, *PLACES, *FOOD]


class Transformer(nn.Module):
    """Words (N, T) to logits of the next words (N, T, V)."""

    def __init__(self, width=32, layers=2):
        super().__init__()
        self.embed, self.place = nn.Embedding(len(WORDS), width), nn.Embedding(8, width)
        block = {"batch_first": True, "dropout": 0.0, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, **block) for _ in range(layers)
        )
        self.head = nn.Linear(width, len(WORDS))

    def forward(self, words):
        steps = torch.arange(words.shape[1])
        h = self.embed(words) + self.place(steps)
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        return self.head(h)


def sentences(count):
    """Tokens (N, 6): where an animal lives, or what it eats."""
    random.seed(0)
    lives = {a: random.choice(PLACES) for a in ANIMALS}
    eats = {a: random.choice(FOOD) for a in ANIMALS}
    texts = []
    for _ in range(count):
        a = random.choice(ANIMALS)
        where = f"the {a} lives in a {lives[a]}", f"the {a} eats the {eats[a]} ."
        texts.append(random.choice(where))
    return torch.tensor([[WORDS.index(w) for w in text.split()] for text in texts]), texts


def main():
    torch.manual_seed(0)
    words, texts = sentences(300)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(25):
        for batch in words.split(50):
            loss = F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(words, words), 50)
    likelihood = Categorical(class_dim=-1, shift=1)
    kfac = {"likelihood": likelihood, "estimator": "mc", "seed": 0, "params": nn.Linear}
    fisher = ng.FIM(model, loader, "ekfac", **kfac)

    asked = next(i for i, text in enumerate(texts) if text.startswith("the owl lives"))
    query = words[asked : asked + 1, :5]  # all but the place itself

    def of_the_answer(outputs, batch):  # minus its log probability: large scores help
        return -outputs[:, -1].log_softmax(-1)[:, words[asked, -1]]

    queries = ng.Queries(model, fisher, query, measure=of_the_answer, damping=1e-3)
    best = ng.influences(model, fisher, loader, queries, top=300)
    helpful = [texts[i] for i in best.indices[0].tolist()]
    first = list(dict.fromkeys(helpful))[:5]
    print(f"{texts[asked]!r} rests on:\n  " + "\n  ".join(first))

    chosen = words[best.indices[0, :1]]  # one sentence, word by word
    scores = ng.influences(model, fisher, (chosen, chosen), queries, per="token")[0, 0]
    each = zip(helpful[0].split(), scores.tolist(), strict=True)
    said = [f"{word} {score:.2g}" for word, score in each]
    print("word by word (what predicts the next): " + ", ".join(said))


if __name__ == "__main__":
    main()
