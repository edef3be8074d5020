"""Embedding control: the target's text only at the words that changed, the source's everywhere else.

CLIP writes into every token what stood before it, so one exchanged word changes the embedding of all that follow, of
the end token and of the padding, and with them parts of the picture that the word does not name. Here they keep the
source's. No attention is touched. It suits edits that leave shapes alone: colours, materials, backgrounds.

Paper: MaSaFusion, appendix B, equation 12 and algorithm 4 (EmbCtrl).
"""


def control(source, target, alignment):
    """The text embedding (B, T_target, C): ``source``'s (B, T_source, C) where a token has a counterpart there,
    ``target``'s (B, T_target, C) at the others.

    ``alignment`` (T_target,) holds each target token's number in the source, or -1; see :func:`alignment.align`.
    """
    kept = alignment >= 0
    mixed = target.clone()
    mixed[:, kept] = source[:, alignment[kept]].to(target)
    return mixed
