"""What lies in a folder: its images, the splits and classes that its folders stand for, and what is not read."""
