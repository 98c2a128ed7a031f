"""Makes the bucket of the tracking server's artifacts, unless it is there."""

import os
from urllib.parse import urlsplit

import boto3

bucket = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).netloc
storage = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
if bucket not in [found["Name"] for found in storage.list_buckets()["Buckets"]]:
    storage.create_bucket(Bucket=bucket)
