"""Images in files, folders and datasets, their splits, augmentation and sampling."""
