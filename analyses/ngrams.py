"""How well do counts of tokens and of pairs of tokens predict the next token?"""

import numpy as np
from torch import Tensor


def ngram_losses(train: Tensor, held: Tensor, vocabulary: int) -> tuple[float, float]:
    """Mean loss of a unigram and of a bigram on every token of `held` but the first of a sequence, nats a token.

    Unigram: (count + 1) / (tokens + vocabulary). Bigram: interpolated with it as in Witten & Bell 1991, method C,
    (count(v, w) + kinds(v) p(w)) / (count(v) + kinds(v)), where kinds(v) is how many different tokens follow v.
    """
    v, w = train[:, :-1].flatten().numpy(), train[:, 1:].flatten().numpy()
    unigram = (np.bincount(w, minlength=vocabulary) + 1) / (len(w) + vocabulary)
    pairs = np.bincount(v * vocabulary + w, minlength=vocabulary**2).reshape(vocabulary, vocabulary)
    kinds = np.maximum((pairs > 0).sum(axis=1), 1)  # behind a token that was never seen, the unigram alone
    v, w = held[:, :-1].flatten().numpy(), held[:, 1:].flatten().numpy()
    bigram = (pairs[v, w] + kinds[v] * unigram[w]) / (pairs.sum(axis=1)[v] + kinds[v])
    return float(-np.log(unigram[w]).mean()), float(-np.log(bigram).mean())
