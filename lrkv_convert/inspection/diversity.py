"""How different the heads of a layer are: the diversity metric of arXiv 2601.11471 (Sec 4.3, App
C.1), from the weights alone.

    A_h = W_Q,h W_K,h^T        <A_i, A_j> = tr(A_i^T A_j) = sum (W_Q,i^T W_Q,j) * (W_K,i^T W_K,j)
                               s_ij = <A_i, A_j> / (|A_i| |A_j|)

A_h (D x D) is never formed: the right-hand side multiplies d x d matrices entry by entry. With n
query heads, the effective rank of the Gram matrix G = [s_ij] is exp(entropy of its eigenvalues,
normalised to sum to one), and diversity is that as a share of n: 1/n for heads that are all equal,
1 for orthogonal ones. Centred (J G J with J = I - 1 1^T / n) it forgets what all heads have in
common; one direction is gone, so (n - 1) / n is its ceiling.

It describes and does not measure fidelity: random heads reach the ceiling, and the heads of a
ruined conversion may differ as much as those of its original. Positions (RoPE) and biases do not
enter. For fidelity see `similarity`, head by head, and fidelity.py, on text. Shapes: H KV heads, G
query heads per KV head, n = H G, D width, d head width. float64.
"""

import torch
from torch import Tensor

# a centred Gram matrix whose eigenvalues sum to less than this times n is rounding: all heads are
# equal
NOTHING = 1e-12


def inner_products(W_Q: Tensor, W_K: Tensor, V_Q: Tensor, V_K: Tensor) -> Tensor:
    """<A_i, B_j> (n, n) of the heads A_i = W_Q,i W_K,i^T with the heads B_j = V_Q,j V_K,j^T. W_Q,
    V_Q (H, G, D, d); W_K, V_K (H, D, d).
    """
    H, G, D, d = W_Q.shape
    # (D, heads d)
    columns = lambda W: W.double().reshape(-1, D, d).transpose(0, 1).reshape(D, -1)
    # (heads, d, d)
    blocks = lambda product: product.view(d, -1, d).transpose(0, 1)
    of_queries, of_keys, rows = columns(V_Q), columns(V_K), []
    for h in range(H):
        # (n, d, d)
        keys = blocks(W_K[h].double().T @ of_keys).repeat_interleave(G, dim=0)
        rows += [(blocks(W_Q[h, g].double().T @ of_queries) * keys).sum((1, 2)) for g in range(G)]
    return torch.stack(rows)


def gram(W_Q: Tensor, W_K: Tensor) -> Tensor:
    """[s_ij] (n, n) of query heads W_Q (H, G, D, d) and keys W_K (H, D, d). A dead head is like no
    other, and not even like itself.
    """
    products = inner_products(W_Q, W_K, W_Q, W_K)
    # (n,)
    sizes = products.diagonal().clamp_min(0).sqrt()
    scale = torch.where(sizes > 0, sizes, torch.inf).reciprocal()
    return products * scale.unsqueeze(1) * scale


def similarity(W_Q: Tensor, W_K: Tensor, V_Q: Tensor, V_K: Tensor) -> Tensor:
    """s(A_h, B_h) (n,) of each head with its counterpart, in [-1, 1]: 1 where they differ by a
    factor at most. Shapes as `inner_products`.
    """
    sizes = [
        inner_products(*heads, *heads).diagonal().clamp_min(0).sqrt()
        for heads in ((W_Q, W_K), (V_Q, V_K))
    ]
    size = sizes[0] * sizes[1]
    return torch.where(
        size > 0,
        inner_products(W_Q, W_K, V_Q, V_K).diagonal() / torch.where(size > 0, size, 1.0),
        0.0,
    )


def diversity(gram: Tensor, centred: bool = False) -> float:
    """Effective rank of a Gram matrix (n, n) as a share of n: exp(- sum p log p) / n over its
    eigenvalues p, normalised. 0 if nothing is left.
    """
    n = len(gram)
    if centred:
        gram = gram - gram.mean(0, keepdim=True)
        gram = gram - gram.mean(1, keepdim=True)
    # (n,)
    sizes = torch.linalg.eigvalsh(gram).clamp_min(0)
    if sizes.sum() <= NOTHING * n:
        return 0.0
    return torch.special.entr(sizes / sizes.sum()).sum().exp().item() / n


def ceiling(n: int) -> float:
    """The most that `diversity` of n heads can be when centred."""
    return (n - 1) / n


def mean_diversity(grams: list[Tensor]) -> dict:
    """Means over layers of the diversity of their Gram matrices (n, n), as they are and centred,
    shares of n, and the ceiling of the latter.
    """
    mean = lambda centred: sum(diversity(gram, centred) for gram in grams) / len(grams)
    return {
        "plain": mean(False),
        "centred": mean(True),
        "ceiling_centred": ceiling(len(grams[0])),
        "heads": len(grams[0]),
    }
