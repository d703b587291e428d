"""An independent trainer: plain PyTorch in FP64 from the papers and this project's pages; it imports no megatrain."""
