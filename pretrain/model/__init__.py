"""The masked autoencoder: configuration, tokenizers, transformer, masking, weights.

The last part of a tensor's name gives the tensor's shape, with one letter for each dimension: ``x_BCT`` has shape [B,
C, T]. In the names of tensors, each letter has the same meaning in the whole project:

====  ==========================================================================
B     samples of a batch: windows or trials
n, m  in the probe: all trials of a dataset, and the test trials
C     channels, which are the rows of a window: first the *recorded channels*, then
      padding rows, which are copies of recorded channels
T     time samples of a window
N     tokens along a window: T / patch
M     all tokens of a window. With the temporal tokenizer M = N. With the montage
      tokenizer M = C x N, and token ``c N + i`` is time step i of channel c
K     visible tokens, i.e. those that are not masked
P     values of the signal in one token: C x patch with the temporal tokenizer,
      patch with the montage tokenizer
D     width of a token
H, E  attention heads, and the width of one head
F     features
L     labels (classes)
S     sets of labels, or classifiers
1, 3  a dimension of size 1 or 3; size 3: the coordinates of an electrode
====  ==========================================================================

A letter that only one function uses is not in this table; that function explains it.
"""
