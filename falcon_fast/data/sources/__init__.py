"""Data sets on disk: image folders, CIFAR, SVHN and the digits, with labels where there are any, split into training and test."""
