"""A divergence, a support and a token weight of one's own."""

import torch


def jeffreys(s, t):
    """KL(p‖q) + KL(q‖p) = Σ (p − q)·(log p − log q), of which this is one entry."""
    return (s.exp() - t.exp()) * (s - t)


def with_teachers_first(student_ids_CK, teacher_ids_CK):
    """The student's k most likely tokens, and the teacher's favourite if it is none of them."""
    first_C1 = teacher_ids_CK[:, :1]
    new_C1 = ~(student_ids_CK == first_C1).any(-1, keepdim=True)
    all_CK = torch.ones_like(student_ids_CK, dtype=torch.bool)
    return torch.cat([student_ids_CK, first_C1], -1), torch.cat([all_CK, new_C1], -1)


def where_they_differ(student_logp_N, teacher_logp_N, *, scale):
    """tanh(|log p(y) − log q(y)| / scale): agreement teaches nothing, outliers weigh at most 1."""
    return ((student_logp_N - teacher_logp_N).abs() / scale).tanh()
