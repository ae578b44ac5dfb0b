"""What the trainer trains: masked pre-training, and the tasks that it is for, one file each."""
