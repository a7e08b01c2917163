"""Small networks of further kinds for `experiments.coverage.run`, each written as its field's code has it."""

from __future__ import annotations

from functools import partial

from experiments.coverage.kinds import functions, generators, graphs, sequences, vision
from experiments.coverage.small_networks import Entry

GRAPH, PAIR = ((7, 5), (2, 12)), ((1, 12, 12),) * 2
NETWORKS: dict[str, Entry] = {
    "gcn": (graphs.Gcn, GRAPH, (0, 7)),
    "gat": (graphs.Gat, GRAPH, (0, 7)),
    "dgcnn_edge_conv": (graphs.Dgcnn, ((3, 10),), (0,)),
    "pointnet2_set_abstraction": (graphs.PointNet2, ((16, 3),), (0,)),
    "dcgan_generator": (generators.DcganGenerator, ((16,),), (0,)),
    "stylegan2_modulated_conv": (generators.StyleGan, ((12,),), (0,)),
    "stylegan_adain": (generators.AdaInGenerator, ((12,),), (0,)),
    "autoencoder_unflatten": (generators.ConvAutoencoder, ((1, 16, 16),), (0,)),
    "vae": (generators.Vae, ((1, 8, 8),), (0,)),
    "dit": (generators.Dit, ((3, 16, 16), ()), (0, 1000)),
    "actor_critic_lstm_done_masks": (sequences.ActorCritic, ((5, 6), (5,)), (0, 2)),
    "conv_lstm": (sequences.ConvLstm, ((3, 2, 6, 6),), (0,)),
    "n_beats": (sequences.NBeats, ((12,),), (0,)),
    "wavenet": (sequences.WaveNet, ((1, 16),), (0,)),
    "perceiver": (sequences.Perceiver, ((9, 6),), (0,)),
    "moe_top2_index_add": (sequences.MixtureOfExperts, ((7,),), (50,)),
    "moe_top2_dense": (sequences.SoftMixture, ((7, 6),), (0,)),
    "retnet": (sequences.Retention, ((7,),), (50,)),
    "selective_scan": (sequences.SelectiveScan, ((7,),), (50,)),
    "pinn": (functions.Pinn, ((2,),), (0,)),
    "kan": (functions.Kan, ((4,),), (0,)),
    "made": (functions.Made, ((6,),), (0,)),
    "fno_complex": (functions.Fno, ((16, 2),), (0,)),
    "fno_real_pairs": (partial(functions.Fno, functions.RealSpectralConv), ((16, 2),), (0,)),
    "hypernetwork": (functions.HyperNetwork, ((5,), (4,)), (0, 0)),
    "film": (functions.FilmNetwork, ((3, 8, 8), (6,)), (0, 0)),
    "yolo": (vision.Yolo, ((3, 32, 32),), (0,)),
    "capsules": (vision.CapsuleNetwork, ((1, 9, 9),), (0,)),
    "siamese": (vision.Siamese, PAIR, (0, 0)),
    "contrastive": (vision.Projected, PAIR, (0, 0)),
    "unet_attention_gates": (vision.AttentionUNet, ((3, 13, 14),), (0,)),
}
"""Every network by name."""
