#!/usr/bin/env perl
# Streams of Connect for curl: each message of one has five bytes in front, a flag and its length.
#
#   frames.pl send                    frames each line of the standard input, a request as JSON
#   frames.pl upload PARENT ID FILE   writes the requests that upload a file as ID, framed
#   frames.pl receive                 prints each message of an answer on a line of its own; the last one, {"end":…},
#                                     has the error, if there is one
use strict;
use warnings;
use Digest::SHA;
use File::Basename 'basename';
use MIME::Base64 'encode_base64';

use constant PART_BYTES => 1 << 20;
use constant LAST => 2;

$| = 1;
my ($command, @arguments) = @ARGV;
binmode STDIN;
my %commands = (send => \&send_lines, upload => \&upload, receive => \&receive);
($commands{ $command // '' } // die "give send, upload or receive\n")->(@arguments);

sub send_lines {
    while (my $line = <STDIN>) { chomp $line; put($line) }
}

sub put { my ($json) = @_; print pack('xN', length $json), $json }

sub upload {
    my ($parent, $id, $path) = @_;
    open my $file, '<:raw', $path or die "$path: $!\n";
    my ($name, $sha256) = (basename($path), Digest::SHA->new(256)->addfile($file)->hexdigest);
    $name =~ s/(["\\])/\\$1/g;
    my $header = sprintf '"path":"%s","sizeBytes":"%d","sha256":"%s"', $name, -s $file, $sha256;
    put(sprintf '{"header":{"parent":"%s","resourceId":"%s","requestId":"%s","files":[{%s}]}}',
        $parent, $id, uuid(), $header);
    seek $file, 0, 0;
    my $offset = 0;
    while (my $length = read $file, my $data, PART_BYTES) {
        put(sprintf '{"chunk":{"offset":"%d","data":"%s","crc32c":%d}}',
            $offset, encode_base64($data, ''), crc32c($data));
        $offset += $length;
    }
}

sub receive {
    while (read STDIN, my $head, 5) {
        # A refusal before the stream is JSON alone.
        if (substr($head, 0, 1) eq '{') { print '{"end":{"error":', $head, <STDIN>, "}}\n"; last }
        my ($flag, $length) = unpack 'CN', $head;
        read(STDIN, my $message, $length) == $length or last;
        print $flag & LAST ? "{\"end\":$message}\n" : "$message\n";
    }
}

sub crc32c {
    our @table = @table ? @table : map { my $c = $_; $c = $c & 1 ? $c >> 1 ^ 0x82f63b78 : $c >> 1 for 1 .. 8; $c } 0 .. 255;
    my $value = 0xffffffff;
    $value = $value >> 8 ^ $table[($value ^ $_) & 0xff] for unpack 'C*', $_[0];
    return $value ^ 0xffffffff;
}

# A UUID of version 4.
sub uuid {
    open my $random, '<:raw', '/dev/urandom' or die "/dev/urandom: $!\n";
    read $random, my $bytes, 16;
    my @byte = unpack 'C16', $bytes;
    ($byte[6], $byte[8]) = ($byte[6] & 0x0f | 0x40, $byte[8] & 0x3f | 0x80);
    return join '-', unpack 'A8 A4 A4 A4 A12', join '', map { sprintf '%02x', $_ } @byte;
}
