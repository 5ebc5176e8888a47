{{- define "decar.name" -}}
{{- if contains "decar" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-decar" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "decar.selector" -}}
app.kubernetes.io/name: decar
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "decar.labels" -}}
{{ include "decar.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "decar.secret" -}}
{{ .Values.apiKey.existingSecret | default (include "decar.name" .) }}
{{- end }}
