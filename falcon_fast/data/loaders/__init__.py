"""The loaders: each shows the network the views that the clock names, whatever decodes and crops them."""
