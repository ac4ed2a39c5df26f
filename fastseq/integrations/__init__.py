"""What makes other libraries run fastseq's kernels, a module each; none is imported with fastseq."""
