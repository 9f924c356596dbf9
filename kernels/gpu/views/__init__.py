"""Views in Triton: crops of images that are resident on the GPU, and their colours."""
