"""The masked autoencoder: configuration, tokenizers, transformer, masking, weights.

The last part of a tensor's name gives the tensor's shape, with one letter for each dimension: ``x_BCT`` has shape [B,
C, T]. The letters have these meanings, unless the docstring of a module or function gives a letter another meaning:

====  ==========================================================================
B     samples of a batch: windows or trials
n     in the probe: all trials of a dataset
m     in the probe: test trials
C     channels, which are the rows of a window: first the *recorded channels*, then
      padding rows, which are copies of recorded channels
T     time samples of a window
N     tokens along a window, i.e. one after another in time: T / patch
M     all tokens of a window. With the temporal tokenizer M = N. With the montage
      tokenizer M = C x N, and token ``c N + i`` is the i-th token of channel c
K     visible tokens, i.e. those that are not masked
P     values of the signal in one token: C x patch with the temporal tokenizer,
      patch with the montage tokenizer
D     width of a token
H     attention heads
E     width of one attention head
F     features
L     labels (classes)
S     in the probe: sets of labels, each of which has its own classifier
1     a dimension of size 1
3     x, y and z of an electrode's position, or the colours of an image
====  ==========================================================================

A letter that only one function uses is not in this table; the docstring of the function explains the letter.
"""
