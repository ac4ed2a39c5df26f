"""A character language model, trained by fastseq and by torch.nn side by side (`python -m fastseq demo`)."""
