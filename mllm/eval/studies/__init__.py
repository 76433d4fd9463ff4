"""What does a score mean: ablation, stress, contamination, comparison?"""
