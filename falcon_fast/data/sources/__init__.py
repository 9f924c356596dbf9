"""What is on disk: folders, CIFAR, SVHN and the digits as images with labels, split into training and test."""
