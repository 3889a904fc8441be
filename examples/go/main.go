// Fine-tunes a classifier from a CSV file, follows it to its end, and asks it:
//
//	buf generate ../.. --template buf.gen.yaml && go mod tidy && go build
//	./finetune MODEL reviews.csv 'a good film'
//
// MODEL is `projects/…/models/…`, or the path of a model folder on the server. SHARDYARD_ADDRESS, SHARDYARD_CA,
// SHARDYARD_TOKEN and SHARDYARD_PROJECT say which service, and who calls (reach.go).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "example.org/finetune/gen/shardyard/v1"
)

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, explained(err))
		os.Exit(1)
	}
}

func run(ctx context.Context, arguments []string) error {
	if len(arguments) < 2 {
		return errors.New("give a model, a CSV file with the columns text and label, and texts")
	}
	conn, err := connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	dataset, err := upload(ctx, pb.NewDatasetServiceClient(conn), arguments[1])
	if err != nil {
		return err
	}
	jobs := pb.NewJobServiceClient(conn)
	var job *pb.Job
	request := &pb.CreateJobRequest{Parent: parent, RequestId: newID(), Job: &pb.Job{Spec: specOf(arguments[0], dataset)}}
	if err = patiently(func() error { job, err = jobs.CreateJob(ctx, request); return err }); err != nil {
		return err
	}
	fmt.Println("submitted", job.Name)
	state, err := watch(ctx, jobs, job.Name)
	if err != nil {
		return err
	}
	if state != pb.State_STATE_SUCCEEDED {
		return fmt.Errorf("%s ended as %s", job.Name, short(state))
	}
	if job, err = jobs.GetJob(ctx, &pb.GetJobRequest{Name: job.Name}); err != nil {
		return err
	}
	return predict(ctx, pb.NewModelServiceClient(conn), job.Model, arguments[2:])
}

func specOf(model, dataset string) *pb.JobSpec {
	source := &pb.ModelSource{Source: &pb.ModelSource_Uri{Uri: model}}
	if strings.HasPrefix(model, "projects/") {
		source = &pb.ModelSource{Source: &pb.ModelSource_Model{Model: model}}
	}
	classification := &pb.FineTuning_TextClassification{TextClassification: &pb.TextClassification{}}
	return &pb.JobSpec{
		Task:         &pb.JobSpec_FineTuning{FineTuning: &pb.FineTuning{Task: classification}},
		Model:        source,
		TrainData:    &pb.DataSource{Source: &pb.DataSource_Dataset{Dataset: dataset}},
		Optimization: &pb.Optimization{Duration: &pb.Optimization_Epochs{Epochs: 2}},
	}
}

// watch prints every event once and in order: a stream that breaks is taken up again behind the last event that came.
func watch(ctx context.Context, jobs pb.JobServiceClient, name string) (pb.State, error) {
	state, after := pb.State_STATE_UNSPECIFIED, int64(0)
	for {
		stream, err := jobs.WatchJob(ctx, &pb.WatchJobRequest{Name: name, AfterSequence: after})
		for err == nil {
			var batch *pb.WatchJobResponse
			if batch, err = stream.Recv(); err != nil {
				break
			}
			if batch.AfterSequence > after {
				return state, fmt.Errorf("events %d to %d are missing", after, batch.AfterSequence)
			}
			for _, event := range batch.Events {
				if event.Sequence <= after {
					continue
				}
				fmt.Println(event.Sequence, line(event))
				if changed := event.GetState(); changed != nil {
					state = changed.To
				}
			}
			if batch.LastSequence > after {
				after = batch.LastSequence
			}
		}
		if err == io.EOF { // A stream ends well only after the last event.
			return state, nil
		}
		if status.Code(err) != codes.Unavailable {
			return state, err
		}
		time.Sleep(time.Second)
	}
}

func predict(ctx context.Context, models pb.ModelServiceClient, model string, texts []string) error {
	request := &pb.PredictRequest{Model: model}
	for _, text := range texts {
		request.Instances = append(request.Instances, &pb.Instance{Input: &pb.Instance_Text{Text: text}})
	}
	answer, err := models.Predict(ctx, request)
	if err != nil {
		return err
	}
	for at, prediction := range answer.Predictions {
		found, best := prediction.GetClassification(), float32(0)
		for _, each := range found.Scores {
			if float32(each.Score) > best {
				best = float32(each.Score)
			}
		}
		fmt.Printf("%s %.3f %s\n", found.Label, best, texts[at])
	}
	return nil
}

func line(event *pb.JobEvent) string {
	switch payload := event.Payload.(type) {
	case *pb.JobEvent_State:
		return short(payload.State.From) + " → " + short(payload.State.To)
	case *pb.JobEvent_Progress:
		return fmt.Sprintf("step %d: loss %.4f", payload.Progress.Step, payload.Progress.Loss)
	case *pb.JobEvent_Evaluation:
		return fmt.Sprintf("evaluation: %v", payload.Evaluation.Metrics)
	case *pb.JobEvent_Warning:
		return "warning " + payload.Warning.Reason + ": " + payload.Warning.Message
	}
	return strings.TrimPrefix(fmt.Sprintf("%T", event.Payload), "*shardyardv1.JobEvent_")
}

func short(state pb.State) string { return strings.TrimPrefix(state.String(), "STATE_") }
