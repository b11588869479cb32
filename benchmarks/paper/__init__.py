"""The experiments of the PagedAttention paper (Kwon et al., SOSP 2023, arXiv 2309.06180) that need no GPU."""
