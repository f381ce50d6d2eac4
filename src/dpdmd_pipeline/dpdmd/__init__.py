"""The method: DP-DMD as functions of tensors. Torch only."""
