package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// How the service is reached, by the variables that the SDK and the command line read, too:
//
//	SHARDYARD_ADDRESS     host:port of the service [127.0.0.1:7400]
//	SHARDYARD_CA          TLS: the service's authority, a PEM file, or `system` for those of this machine
//	SHARDYARD_TOKEN       who calls; without TLS it is sent to this machine only
//	SHARDYARD_TOKEN_FILE  a file with the token, read again for every call, if SHARDYARD_TOKEN is not set
//	SHARDYARD_PROJECT     the project [default]
var (
	address = variable("SHARDYARD_ADDRESS", "127.0.0.1:7400")
	ca      = variable("SHARDYARD_CA", "")
	parent  = "projects/" + variable("SHARDYARD_PROJECT", "default")
)

// variable is a variable of the environment; an empty one is not set.
func variable(name, otherwise string) string {
	if found := os.Getenv(name); found != "" {
		return found
	}
	return otherwise
}

func connect() (*grpc.ClientConn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil || strings.Contains(address, "/") {
		return nil, fmt.Errorf("SHARDYARD_ADDRESS is %s; give HOST:PORT alone", address)
	}
	caller := bearer{variable("SHARDYARD_TOKEN", ""), variable("SHARDYARD_TOKEN_FILE", "")}
	options := []grpc.DialOption{grpc.WithInsecure()}
	if ca != "" {
		authority := credentials.NewClientTLSFromCert(nil, "")
		if ca != "system" {
			if authority, err = credentials.NewClientTLSFromFile(ca, ""); err != nil {
				return nil, fmt.Errorf("SHARDYARD_CA: %v", err)
			}
		}
		options = []grpc.DialOption{grpc.WithTransportCredentials(authority)}
	}
	if caller != (bearer{}) {
		if ip := net.ParseIP(host); ca == "" && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return nil, fmt.Errorf("%s is not on this machine and the connection is not encrypted: the token would be "+
				"readable on the way; set SHARDYARD_CA to the service's authority, or to `system`", address)
		}
		options = append(options, grpc.WithPerRPCCredentials(caller))
	}
	return grpc.Dial(address, options...)
}

// bearer is the token that is sent with every call, or the file that it is in.
type bearer struct{ token, file string }

func (caller bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token := caller.token
	if token == "" {
		content, err := os.ReadFile(caller.file)
		if err != nil {
			return nil, status.Error(codes.FailedPrecondition, err.Error())
		}
		token = strings.TrimSpace(string(content))
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity asks gRPC for TLS; `connect` lets nothing else but this machine be without.
func (bearer) RequireTransportSecurity() bool { return ca != "" }

// patiently repeats a call while the service is busy, or its own deadline passes: with the same request id it is
// accepted once.
func patiently(call func() error) error {
	for tries := 1; ; tries++ {
		err := call()
		found := status.Convert(err)
		isBusy := found.Code() == codes.Unavailable || found.Code() == codes.DeadlineExceeded
		if !isBusy || len(found.Details()) == 0 || tries == 20 {
			return err
		}
		time.Sleep(3 * time.Second)
	}
}

// explained puts an error in words. Those of the service name the next step; those of the connection need it added.
func explained(err error) error {
	found, isStatus := status.FromError(err)
	if !isStatus {
		return err
	}
	text := found.Message()
	switch {
	case found.Code() != codes.Unavailable || len(found.Details()) > 0:
		return fmt.Errorf("%s: %s", found.Code(), text)
	case strings.Contains(text, "x509:"):
		return fmt.Errorf("the certificate of %s: %s; is SHARDYARD_CA its authority, and the name right?", address, text)
	case strings.Contains(text, "tls: first record does not look like"):
		return fmt.Errorf("%s does not speak TLS; leave SHARDYARD_CA out if that is meant", address)
	case ca == "":
		text += "; is the address right? Set SHARDYARD_CA if the service has TLS."
	default:
		text += "; is the address right?"
	}
	return errors.New("no service at " + address + ": " + text)
}
