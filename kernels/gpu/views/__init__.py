"""Views in Triton: crops of images that lie on the GPU, and their colours."""
