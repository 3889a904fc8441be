package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "example.org/finetune/gen/shardyard/v1"
)

const partBytes = 1 << 20

// upload sends a file as a data set: a header, then its parts, each with its checksum. It returns the data set's name.
func upload(ctx context.Context, datasets pb.DatasetServiceClient, path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(content)
	digest := hex.EncodeToString(sum[:])
	id := "d-" + digest[:32] // The same content has the same name, and is sent once.
	stream, err := datasets.CreateDataset(ctx)
	if err != nil {
		return "", err
	}
	file := &pb.UploadFile{Path: filepath.Base(path), SizeBytes: int64(len(content)), Sha256: digest}
	header := &pb.UploadHeader{Parent: parent, ResourceId: id, RequestId: newID(), Files: []*pb.UploadFile{file}}
	send := func(message *pb.CreateDatasetRequest) bool { return stream.Send(message) == nil }
	// If sending fails, the answer says why.
	sent := send(&pb.CreateDatasetRequest{Message: &pb.CreateDatasetRequest_Header{Header: header}})
	for at := 0; sent && at < len(content); at += partBytes {
		end := at + partBytes
		if end > len(content) {
			end = len(content)
		}
		data := content[at:end]
		checksum := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))
		chunk := &pb.Chunk{Offset: int64(at), Data: data, Crc32C: checksum}
		sent = send(&pb.CreateDatasetRequest{Message: &pb.CreateDatasetRequest_Chunk{Chunk: chunk}})
	}
	dataset, err := stream.CloseAndRecv()
	if status.Code(err) == codes.AlreadyExists {
		return parent + "/datasets/" + id, nil
	}
	if err != nil {
		return "", err
	}
	return dataset.Name, nil
}

// newID makes a UUID of version 4.
func newID() string {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		panic(err)
	}
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}
